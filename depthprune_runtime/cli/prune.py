"""`depthprune prune` and `depthprune import`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from depthprune_runtime.cli.common import (
    add_calibration,
    add_force,
    add_placement,
    add_shards,
    print_json,
    progress,
    show,
)
from depthprune_runtime.cli.flags import add_flags, given
from depthprune_runtime.cli.parser import Parser
from depthprune_runtime.errors import InputError

if TYPE_CHECKING:
    from depthprune_runtime.pruning.result import PruneResult

_REPAIR = "repair_"  # what the flags of RepairOptions begin with


def _repair_choice(args: argparse.Namespace) -> Any:
    from depthprune_runtime.fitting.options import RepairOptions

    values = given(args, RepairOptions, _REPAIR)
    if args.repair == "none" and values:
        raise InputError(f"repair: none takes no options, got {', '.join(values)}")
    return RepairOptions(**values) if values else args.repair


def _method_options(args: argparse.Namespace) -> Any:
    """Options of the method that was asked for; a flag of another method is refused by name. None where a plan or
    layers by hand take its place."""
    from depthprune_runtime.pruning.method import DEFAULT, all_methods, method_options

    values: dict[str, Any] = {}
    for method in all_methods():
        values |= given(args, method.options)
    if args.plan is None and args.drop is None:
        return method_options(args.method or DEFAULT, values)
    if values:
        raise InputError(f"{'plan' if args.plan else 'drop'}: no method decides, so it takes no {', '.join(values)}")
    return None


def _prune(args: argparse.Namespace) -> None:
    from depthprune_runtime.pruning.prune import prune

    result = prune(
        args.model,
        args.output,
        args.method,
        blocks=args.blocks,
        sublayers=args.sublayers,
        sparsity=args.sparsity,
        options=_method_options(args),
        plan=args.plan,
        drop=args.drop,
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
    )
    if args.json:
        print_json(_data(result))
    else:
        show(f"{result.path}: {_report(result)}")


def _data(result: PruneResult) -> dict[str, Any]:
    sizes = {
        "parameters": result.parameters,
        "parent_parameters": result.parent_parameters,
        "sparsity": result.sparsity,
        "plan": result.plan.to_json(),
    }
    if result.spec is None or result.parent is None:
        return {"output": str(result.path), "dropped": sorted(result.plan.dropped()), **sizes}
    counts = {"sublayers": len(result.spec.sublayers), "parent_sublayers": len(result.parent.sublayers)}
    return {"output": str(result.path), **counts, **sizes}


def _report(result: PruneResult) -> str:
    plan = result.plan
    if result.spec is None or result.parent is None:
        return (
            f"{plan.settings['model_type']}, dropped blocks {sorted(plan.dropped())} of "
            f"{plan.settings['parent_blocks']}, without repair; sparsity {result.sparsity:.1%}, embeddings included; "
            "a Hugging Face folder"
        )
    counts = {kind: sum(e.kind == kind for e in plan.edits) for kind in ("drop", "flatten", "narrow")}
    did = ", ".join(f"{kind} {n}" for kind, n in counts.items() if n) or "nothing"
    return (
        f"{plan.method} ({did}); {len(result.spec.sublayers)} of {len(result.parent.sublayers)} sub-layers and "
        f"{result.parameters:,} of {result.parent_parameters:,} parameters left "
        f"(sparsity {result.sparsity:.1%}, embeddings included)"
    )


def _import(args: argparse.Namespace) -> None:
    from depthprune_runtime.checkpoint.writing import import_model

    spec = import_model(
        args.model,
        args.output,
        adapter=args.adapter,
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
    from depthprune_runtime.fitting.options import REPAIRS, RepairOptions
    from depthprune_runtime.pruning.method import DEFAULT, METHODS, all_methods

    p = commands.add_parser("prune", parents=[common], help="make a dense model shallower, without training")
    p.add_argument("model", metavar="MODEL", help="our file, a Hugging Face folder or hub id, or a GGUF file")
    p.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the pruned, self-contained file (Mamba, RWKV: a folder)"
    )
    p.add_argument("--method", choices=tuple(METHODS), help=f"what decides (default {DEFAULT})")
    size = p.add_mutually_exclusive_group(required=True)
    size.add_argument("--blocks", type=int, metavar="N", help="N blocks fewer (finercut: their parameters)")
    size.add_argument("--sublayers", type=int, metavar="N", help="finercut: sub-layers to drop")
    size.add_argument(
        "--sparsity", type=float, metavar="R", help="least share of parameters to remove, embeddings included"
    )
    size.add_argument("--plan", metavar="FILE", help="replay a plan: JSON as inspect --json shows it, or edits alone")
    size.add_argument("--drop", metavar="LAYERS", help="blocks and sub-layers by hand, such as 21-28,5.attention")
    add_calibration(p, "what suits the method")
    p.add_argument(
        "--repair",
        choices=REPAIRS,
        default="auto",
        help="closed-form repair of what stays (default ridge; Mamba, RWKV: none)",
    )
    add_placement(p, "of the output")
    add_shards(p)
    add_force(p)
    for method in all_methods():
        add_flags(p.add_argument_group(method.name), method.options)
    add_flags(p.add_argument_group("repair"), RepairOptions, _REPAIR)
    p.set_defaults(run=_prune)


def add_import(commands: Any, common: Parser) -> None:
    p = commands.add_parser("import", parents=[common], help="write a dense model as one self-contained file")
    p.add_argument("model", metavar="MODEL")
    p.add_argument("-o", "--output", required=True, metavar="FILE")
    p.add_argument("--adapter", metavar="FOLDER", help="merge this LoRA adapter, as PEFT saves it, into MODEL")
    p.add_argument("--dtype", default="auto", help="bf16, fp16 or fp32 (default: the source's)")
    add_shards(p)
    add_force(p)
    p.set_defaults(run=_import)
