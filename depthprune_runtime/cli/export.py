"""`depthprune export`."""

from __future__ import annotations

import argparse
from typing import Any

from depthprune_runtime.cli.common import add_force, print_json, progress, show
from depthprune_runtime.cli.parser import Parser


def _export(args: argparse.Namespace) -> None:
    from depthprune_runtime.export.export import export_model

    result = export_model(
        args.model,
        args.output,
        args.to,
        dtype=args.dtype,
        dequantize=args.dequantize,
        check=args.check,
        license=args.license,
        perplexity=args.perplexity,
        push_to=args.push,
        private=args.private,
        max_shard_size=args.max_shard_size,
        overwrite=args.force,
        progress=progress(args),
    )
    if args.json:
        print_json(result.to_json())
        return
    checked = (
        "not checked" if result.distance is None else f"its logits are the model's (relative L2 {result.distance:.1e})"
    )
    pushed = "" if result.url is None else f"; pushed to {result.url}"
    show(f"{result.path}: {result.target}, {result.kind}; {checked}{pushed}")


def add_export(commands: Any, common: Parser) -> None:
    from depthprune_runtime.export.names import EXPORT_DTYPES, TARGETS

    p = commands.add_parser("export", parents=[common], help="write a model for another runtime")
    p.add_argument("model", metavar="MODEL", help="dense or pruned: our file, a Hugging Face folder or hub id, or GGUF")
    p.add_argument(
        "--to",
        required=True,
        choices=TARGETS,
        help="hf: Hugging Face folder; gguf: file for llama.cpp; deci: DeciLM folder for vLLM, SGLang and MLX-LM",
    )
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="the folder, or the file for gguf")
    p.add_argument("--dtype", default="auto", choices=("auto", *EXPORT_DTYPES), help="default: the source's")
    p.add_argument("--dequantize", action="store_true", help="write what the codes of a quantised model stand for")
    p.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read it back and compare its logits with the model's (default on)",
    )
    p.add_argument("--license", metavar="ID", help="license on the model card, such as apache-2.0")
    p.add_argument("--perplexity", metavar="TEXT", help="perplexity on the model card, such as '12.3 on wikitext2'")
    p.add_argument("--push", metavar="OWNER/NAME", help="upload it to this repository of the Hugging Face hub")
    p.add_argument("--private", action="store_true", help="make that repository private, where it is made")
    p.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file in a folder (default 5GB)")
    add_force(p, "OUT")
    p.set_defaults(run=_export)
