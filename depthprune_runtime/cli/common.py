"""What the commands share: the parser, JSON on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
from typing import Any


def show(text: str) -> None:
    """Print a result for people; what a terminal would obey rather than show is escaped."""
    for line in text.split("\n"):
        print(line if line.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in line))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def print_json(data: object) -> None:
    """Print JSON that a terminal shows as it is: JSON itself allows some control characters in a text."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if not text.replace("\n", "").isprintable():
        text = "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)
    print(text)


def progress(args: argparse.Namespace) -> Any:
    from depthprune_runtime.progress import Progress

    return Progress(visible=not args.quiet)


def load(args: argparse.Namespace) -> Any:
    from depthprune_runtime.engine.runtime import Runtime

    return Runtime.load(args.model, args.device, args.dtype, activations=args.activations)


def add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="weights above this go to several files, such as FILE-00001-of-00002-*, that move with FILE (default 5GB)",
    )


def add_force(parser: argparse.ArgumentParser, what: str = "FILE") -> None:
    parser.add_argument(
        "--force", action="store_true", help=f"let {what} replace a file that is there (never one of the model's own)"
    )


def add_calibration(parser: argparse.ArgumentParser, suits: str) -> None:
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="TEXT",
        help="UTF-8 file, or builtin (English that Python carries; default) or wikitext2",
    )
    parser.add_argument("--samples", type=int, metavar="N", help=f"calibration windows (default: {suits})")
    parser.add_argument("--seq-len", type=int, metavar="S", help=f"tokens in each (default: {suits})")
    parser.add_argument("--seed", type=int, default=0, help="which windows are drawn (default 0)")
    parser.add_argument(
        "--first-windows", dest="seed", action="store_const", const=None, help="take the text's first windows instead"
    )


def add_placement(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help=f"bf16, fp16 or fp32 {what} (default: the source's)")


def add_activations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations",
        default="auto",
        metavar="TYPE",
        help="what meets weights of 8 or 4 bits: int8, or the model's dtype, such as bf16: not rounded and, on a CPU, "
        "several times slower (default: int8 on a CPU)",
    )
