"""`depthprune heal`."""

from __future__ import annotations

import argparse
from typing import Any

from depthprune_runtime.cli.common import add_force, add_placement, add_shards, print_json, progress, show
from depthprune_runtime.cli.parser import Parser

# Fields of HealOptions: name -> (type, metavar, help). Defaults are those of the preset.
_NUMBERS: dict[str, tuple[type, str, str]] = {
    "rank": (int, "R", "of each addition (8)"),
    "alpha": (float, "A", "additions are scaled by alpha / rank (16)"),
    "learning_rate": (float, "L", "the peak (1e-4)"),
    "epochs": (float, "E", "how often the data is gone through (2)"),
    "tokens": (int, "N", "train on so many tokens instead"),
    "batch": (int, "B", "windows in a step (8)"),
    "micro_batch": (int, "B", "windows that run together (1)"),
    "seq_len": (int, "S", "tokens in a window (512)"),
    "warmup": (float, "R", "share of the steps in which the learning rate rises (0.03)"),
    "clip": (float, "C", "largest norm of the gradient (1)"),
    "weight_decay": (float, "D", "of AdamW (0)"),
    "top_k": (int, "K", "logits of the teacher that are kept for a token (64)"),
    "hidden_weight": (float, "W", "weight of the distance of the last hidden states (0)"),
    "held_out": (int, "N", "windows that are only reported on (16)"),
    "eval_every": (int, "N", "steps between reports on them (50)"),
    "save_every": (int, "N", "steps between saves of the state (50)"),
    "seed": (int, "N", "of the windows' order and the first additions (0)"),
}
_FLAGS = {
    "recompute": "run each sub-layer again for its gradients, to save memory",
    "cache": "keep the teacher's answers on disk (default)",
}


def _heal(args: argparse.Namespace) -> None:
    from depthprune_runtime.healing.heal import heal
    from depthprune_runtime.healing.options import heal_options

    names = ("train", "optimizer", *_NUMBERS, *_FLAGS)
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    result = heal(
        args.model,
        args.output,
        teacher=args.teacher,
        data=args.data,
        options=heal_options(args.preset, **changes),
        resume=args.resume,
        work=args.work,
        device=args.device,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        overwrite=args.force,
        progress=progress(args),
    )
    first, last = result.history[0], result.history[-1]
    if args.json:
        print_json(
            {
                "output": str(result.path),
                "steps": result.steps,
                "tokens": result.tokens,
                "trained": list(result.trained),
                "held_out_history": [dict(report) for report in result.history],
            }
        )
        return
    show(
        f"{result.path}: {result.steps} steps on {result.tokens:,} tokens changed {len(result.trained)} tensors; held "
        f"out: loss {first['loss']:.4f} -> {last['loss']:.4f}, perplexity {first['perplexity']:.2f} -> "
        f"{last['perplexity']:.2f}"
    )


def add_heal(commands: Any, common: Parser) -> None:
    from depthprune_runtime.healing.options import OPTIMIZERS, PRESETS, TRAIN

    p = commands.add_parser("heal", parents=[common], help="train a pruned file by distillation from its dense parent")
    p.add_argument("model", metavar="FILE", help="a pruned file of our own")
    p.add_argument("--teacher", required=True, metavar="PARENT", help="the dense model that it was pruned from")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="the trained, self-contained file")
    p.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="TEXT[:WEIGHT]",
        help="a name such as wikitext2, a UTF-8 file, or JSON lines with text or messages; can be repeated; "
        "weight: how often an epoch goes through it",
    )
    p.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    p.add_argument("--work", metavar="FOLDER", help="for the run's state and the teacher's answers (OUTPUT.heal)")
    add_placement(p, "to compute in")
    add_shards(p)
    add_force(p)
    g = p.add_argument_group("training")
    g.add_argument("--preset", choices=PRESETS, default="paper", help="options to begin with (default paper)")
    g.add_argument("--train", choices=TRAIN, help="low-rank additions to all linear layers (default), or all weights")
    g.add_argument("--optimizer", choices=OPTIMIZERS, help="adamw (default), or adafactor, which takes less memory")
    for name, (kind, metavar, text) in _NUMBERS.items():
        g.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    for name, text in _FLAGS.items():
        g.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text)
    p.set_defaults(run=_heal)
