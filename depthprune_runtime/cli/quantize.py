"""`depthprune quantize`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
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


def _quantize(args: argparse.Namespace) -> None:
    from depthprune_runtime.quantization.names import DEFAULT_GROUPS
    from depthprune_runtime.quantization.quantize import quantize

    result = quantize(
        args.model,
        args.output,
        args.bits,
        group_size=args.group,
        symmetric=not args.asymmetric,
        method=args.method,
        mend=args.mend,
        lm_head_bits=args.lm_head_bits,
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
    sizes = {
        "weight_bytes": result.weight_bytes,
        "parent_weight_bytes": result.parent_weight_bytes,
        "bytes_per_token": result.bytes_per_token,
        "parent_bytes_per_token": result.parent_bytes_per_token,
    }
    if args.json:
        quantization = {name: asdict(quant) for name, quant in result.quantization.items()}
        print_json({"output": str(result.path), "method": result.method, **sizes, "quantization": quantization})
        return
    kind = "asymmetric" if args.asymmetric else "symmetric"
    group = args.group or DEFAULT_GROUPS[args.bits]
    show(
        f"{result.path}: {result.method}, {args.bits} bits in {kind} groups of {group}, head {args.lm_head_bits} "
        f"bits; weights {result.weight_bytes / 1e6:,.1f} of {result.parent_weight_bytes / 1e6:,.1f} MB, "
        f"{result.bytes_per_token / 1e6:,.1f} of {result.parent_bytes_per_token / 1e6:,.1f} MB read a token"
    )


def add_quantize(commands: Any, common: Parser) -> None:
    from depthprune_runtime.quantization.names import HEAD_BITS, QUANT_METHODS

    p = commands.add_parser("quantize", parents=[common], help="store the weights of a model in 8 or 4 bits")
    p.add_argument("model", metavar="MODEL", help="dense or pruned: our file, a Hugging Face folder or hub id, or GGUF")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="the quantised, self-contained file")
    p.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of every projection (default 8)")
    p.add_argument("--group", type=int, choices=(32, 64, 128), help="inputs that share a scale (64; 4 bits: 32)")
    p.add_argument("--asymmetric", action="store_true", help="give every group a zero point, too")
    p.add_argument(
        "--method", choices=QUANT_METHODS, default="auto", help="auto: gptq for 4 bits, rtn (no calibration) for 8"
    )
    p.add_argument(
        "--mend",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="gptq: solve output projections anew against the errors before them (default on)",
    )
    p.add_argument("--lm-head-bits", type=int, choices=HEAD_BITS, default=8, help="16 leaves the head as it is (8)")
    add_calibration(p, "what suits gptq")
    add_placement(p, "of what stays dense")
    add_shards(p)
    add_force(p)
    p.set_defaults(run=_quantize)
