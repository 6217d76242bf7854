"""`depthprune prune` and `depthprune import`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from depthprune_runtime.cli.common import (
    add_calibration,
    add_force,
    add_placement,
    add_shards,
    print_json,
    progress,
    show,
)
from depthprune_runtime.cli.parser import Parser
from depthprune_runtime.errors import InputError

# Options of single methods: command-line name -> field of the method's options.
_METHOD_OPTIONS = {
    "score": "score",
    "protect_last": "protect_last",
    "distance": "distance",
    "front_protection": "front_protection",
    "fast": "fast",
    "only": "only",
    "state": "state_file",
    "grouping": "grouping",
    "selection": "selection",
    "pairs_only": "pairs_only",
    "keep_width": "keep_width",
    "compensate": "compensate",
    "leverage_lam": "leverage_lam",
}

_REPAIR_OPTIONS = {
    f"repair_{field}": field for field in ("lam", "weighting", "answers_for", "scope", "strength", "samples", "seq_len")
}


def _summary(parent: Any, spec: Any) -> dict[str, Any]:
    before, after = parent.num_parameters(), spec.num_parameters()
    return {
        "sublayers": len(spec.sublayers),
        "parent_sublayers": len(parent.sublayers),
        "parameters": after,
        "parent_parameters": before,
        "sparsity": 1 - after / before,
    }


def _repair_choice(args: argparse.Namespace) -> Any:
    from depthprune_runtime.fitting.options import RepairOptions

    values = {field: getattr(args, name) for name, field in _REPAIR_OPTIONS.items()}
    given = {field: value for field, value in values.items() if value is not None}
    if args.repair == "none" and given:
        raise InputError(f"repair: none takes no options, got {', '.join(given)}")
    return "none" if args.repair == "none" else RepairOptions(**given)


def _prune_other(args: argparse.Namespace) -> None:
    """Mamba and RWKV: whole blocks by Block Influence, written back as a Hugging Face folder."""
    from depthprune_runtime.fitting.calibration import calibration_set
    from depthprune_runtime.pruning.recurrent.prune import prune_other
    from depthprune_runtime.texts import load_text

    if args.method != "shortgpt":
        raise InputError(f"method: Mamba and RWKV models can only be pruned by shortgpt, got {args.method}")
    if args.sublayers is not None:
        raise InputError(
            "sublayers: Mamba and RWKV blocks are not made of attention and FFN; give --blocks or --sparsity"
        )
    others = [name for name in _METHOD_OPTIONS if name not in ("score", "protect_last")]
    given = [name for name in [*others, *_REPAIR_OPTIONS] if getattr(args, name) is not None]
    if given or args.force:
        raise InputError(
            f"Mamba and RWKV models take no option {(given or ['force'])[0].replace('_', '-')}: whole blocks go, "
            "without repair, into a new folder"
        )
    text = load_text(args.calibration)
    name = args.calibration if "/" not in args.calibration else Path(args.calibration).name
    samples = 128 if args.samples is None else args.samples
    seq_len = 256 if args.seq_len is None else args.seq_len
    result = prune_other(
        args.model,
        args.output,
        blocks=args.blocks,
        sparsity=args.sparsity,
        calibration=lambda encode: calibration_set(name, text, encode, samples, seq_len, args.seed),
        score="block-influence" if args.score in (None, "auto") else args.score,
        protect_last=args.protect_last,
        device=args.device,
        dtype=args.dtype,
        progress=progress(args),
    )
    if args.json:
        print_json(
            {
                "output": str(result.path),
                "dropped": list(result.dropped),
                "parameters": result.parameters,
                "parent_parameters": result.parent_parameters,
                "sparsity": result.sparsity,
            }
        )
        return
    show(
        f"{result.path}: {result.model_type}, dropped blocks {list(result.dropped)} of {result.parent_blocks}, without "
        f"repair; sparsity {result.sparsity:.1%}, embeddings included; a Hugging Face folder"
    )


def _is_other_decoder(model: str) -> bool:
    from depthprune_runtime.checkpoint.gate import read_object
    from depthprune_runtime.pruning.recurrent.prune import is_other_decoder

    try:
        return is_other_decoder(read_object(Path(model) / "config.json"))
    except InputError:
        return False  # whatever is wrong with it, opening it as a checkpoint says so


def _prune(args: argparse.Namespace) -> None:
    from depthprune_runtime.pruning.prune import prune

    if _is_other_decoder(args.model):
        _prune_other(args)
        return
    options = {field: getattr(args, name) for name, field in _METHOD_OPTIONS.items()}
    result = prune(
        args.model,
        args.output,
        args.method,
        blocks=args.blocks,
        sublayers=args.sublayers,
        sparsity=args.sparsity,
        repair=_repair_choice(args),
        calibration=args.calibration,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        overwrite=args.force,
        progress=progress(args),
        **{field: value for field, value in options.items() if value is not None},
    )
    summary = _summary(result.parent, result.spec)
    if args.json:
        print_json({"output": str(result.path), **summary, "plan": result.plan.to_json()})
        return
    counts = {kind: sum(e.kind == kind for e in result.plan.edits) for kind in ("drop", "flatten", "narrow")}
    did = ", ".join(f"{kind} {n}" for kind, n in counts.items() if n) or "nothing"
    show(
        f"{result.path}: {args.method} ({did}); {summary['sublayers']} of {summary['parent_sublayers']} sub-layers and "
        f"{summary['parameters']:,} of {summary['parent_parameters']:,} parameters left "
        f"(sparsity {result.sparsity:.1%}, embeddings included)"
    )


def _import(args: argparse.Namespace) -> None:
    from depthprune_runtime.checkpoint.writing import import_model

    spec = import_model(
        args.model,
        args.output,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        overwrite=args.force,
        progress=progress(args),
    )
    if args.json:
        print_json({"output": args.output, "parameters": spec.num_parameters(), "spec": spec.to_json()})
    else:
        show(f"{args.output}: {len(spec.sublayers)} sub-layers, {spec.num_parameters():,} parameters")


def add_prune(commands: Any, common: Parser) -> None:
    from depthprune_runtime.pruning.names import METHODS, REPAIRS

    p = commands.add_parser("prune", parents=[common], help="make a dense model shallower, without training")
    p.add_argument("model", metavar="MODEL", help="our file, a Hugging Face folder or hub id, or a GGUF file")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="the pruned, self-contained file")
    p.add_argument("--method", choices=METHODS, default="shortgpt")
    size = p.add_mutually_exclusive_group(required=True)
    size.add_argument("--blocks", type=int, metavar="N", help="N blocks fewer (finercut: their parameters)")
    size.add_argument("--sublayers", type=int, metavar="N", help="finercut: sub-layers to drop")
    size.add_argument(
        "--sparsity", type=float, metavar="R", help="least share of parameters to remove, embeddings included"
    )
    add_calibration(p, "what suits the method")
    p.add_argument(
        "--repair", choices=REPAIRS, default="ridge", help="closed-form repair of what stays (default ridge)"
    )
    add_placement(p, "of the output")
    add_shards(p)
    add_force(p)
    _add_method_options(p)
    p.set_defaults(run=_prune)


def _add_method_options(p: argparse.ArgumentParser) -> None:
    from depthprune_runtime.fitting.options import ANSWERS, SCOPES, WEIGHTINGS
    from depthprune_runtime.pruning.names import (
        DISTANCES,
        GROUPINGS,
        KINDS,
        SCORES,
        SELECTIONS,
    )

    yes_or_no = argparse.BooleanOptionalAction
    g = p.add_argument_group("shortgpt")
    g.add_argument("--score", choices=SCORES, help="how blocks are chosen; auto: after-repair if a repair follows")
    g.add_argument(
        "--protect-last",
        action=yes_or_no,
        default=None,
        help="never drop the last block (default: as suits the score)",
    )
    g = p.add_argument_group("finercut")
    g.add_argument("--distance", choices=DISTANCES, help=f"between dense and pruned outputs (default {DISTANCES[0]})")
    g.add_argument("--front-protection", type=float, metavar="P", help="share of the front that goes last (0.4)")
    g.add_argument("--fast", action="store_true", default=None, help="re-score only the most promising candidates")
    g.add_argument("--only", choices=KINDS, help="drop sub-layers of this kind only")
    g.add_argument("--state", metavar="FILE", help="save the search here after every step, and resume it from here")
    g = p.add_argument_group("flattengpt")
    g.add_argument("--grouping", choices=GROUPINGS, help="which blocks merge; auto: after-repair if a repair follows")
    g.add_argument("--selection", choices=SELECTIONS, help="which units stay; auto: after-repair if a repair follows")
    g.add_argument("--pairs-only", action="store_true", default=None, help="merge no more than two blocks")
    g.add_argument("--keep-width", type=float, metavar="R", help="0: original width (default), 1: as wide as merged")
    g.add_argument("--no-narrow", dest="keep_width", action="store_const", const=1.0, help="the same as --keep-width 1")
    g.add_argument(
        "--compensate", action=yes_or_no, default=None, help="re-solve down_proj for lost channels (default)"
    )
    g.add_argument("--leverage-lam", type=float, metavar="L", help="ridge of channel scores, relative (default 10)")
    g = p.add_argument_group("repair")
    g.add_argument("--repair-lam", type=float, metavar="L", help="ridge, relative to the mean of the Gram diagonal")
    g.add_argument("--repair-weighting", choices=WEIGHTINGS, help="of the tokens")
    g.add_argument("--repair-answers-for", choices=ANSWERS, help="who answers for a dropped sub-layer")
    g.add_argument("--repair-scope", choices=SCOPES, help="what is solved anew: all, or what the plan touches")
    g.add_argument(
        "--repair-strength", type=float, metavar="S", help="share of the change that is written (finercut 0.6, else 1)"
    )
    g.add_argument("--repair-samples", type=int, metavar="N", help="windows of the repair's walk (--samples, else 128)")
    g.add_argument("--repair-seq-len", type=int, metavar="S", help="tokens in each (--seq-len, else 512)")


def add_import(commands: Any, common: Parser) -> None:
    p = commands.add_parser("import", parents=[common], help="write a dense model as one self-contained file")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("-o", "--output", required=True, metavar="FILE")
    p.add_argument("--dtype", default="auto", help="bf16, fp16 or fp32 (default: the source's)")
    add_shards(p)
    add_force(p)
    p.set_defaults(run=_import)
