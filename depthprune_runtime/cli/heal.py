"""`depthprune heal`."""

from __future__ import annotations

import argparse
from typing import Any

from depthprune_runtime.cli.common import add_force, add_placement, add_shards, print_json, progress, show
from depthprune_runtime.cli.flags import add_flags, given
from depthprune_runtime.cli.parser import Parser


def _heal(args: argparse.Namespace) -> None:
    from depthprune_runtime.healing.heal import heal
    from depthprune_runtime.healing.options import HealOptions, heal_options

    result = heal(
        args.model,
        args.output,
        teacher=args.teacher,
        data=args.data,
        options=heal_options(args.preset, **given(args, HealOptions)),
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
    from depthprune_runtime.healing.options import PRESETS, HealOptions

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
    add_flags(g, HealOptions)
    p.set_defaults(run=_heal)
