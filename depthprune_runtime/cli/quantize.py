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
from depthprune_runtime.cli.flags import add_flags, given
from depthprune_runtime.cli.parser import Parser


def _quantize(args: argparse.Namespace) -> None:
    from depthprune_runtime.quantization.options import QuantizeOptions
    from depthprune_runtime.quantization.quantize import quantize

    options = QuantizeOptions(**given(args, QuantizeOptions))
    result = quantize(
        args.model,
        args.output,
        **vars(options),
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
    kind = "symmetric" if options.symmetric else "asymmetric"
    group, _ = options.resolved()
    show(
        f"{result.path}: {result.method}, {options.bits} bits in {kind} groups of {group}, head {options.lm_head_bits} "
        f"bits; weights {result.weight_bytes / 1e6:,.1f} of {result.parent_weight_bytes / 1e6:,.1f} MB, "
        f"{result.bytes_per_token / 1e6:,.1f} of {result.parent_bytes_per_token / 1e6:,.1f} MB read a token"
    )


def add_quantize(commands: Any, common: Parser) -> None:
    from depthprune_runtime.quantization.options import QuantizeOptions

    p = commands.add_parser("quantize", parents=[common], help="store the weights of a model in 8 or 4 bits")
    p.add_argument("model", metavar="MODEL", help="dense or pruned: our file, a Hugging Face folder or hub id, or GGUF")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="the quantised, self-contained file")
    add_flags(p, QuantizeOptions)
    add_calibration(p, "what suits gptq")
    add_placement(p, "of what stays dense")
    add_shards(p)
    add_force(p)
    p.set_defaults(run=_quantize)
