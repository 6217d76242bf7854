"""What the commands share: the parser, JSON on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn


def print_json(data: object) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def progress(args: argparse.Namespace) -> Any:
    from depthprune_runtime.progress import Progress

    return Progress(visible=not args.quiet)


def load(args: argparse.Namespace) -> Any:
    from depthprune_runtime.engine.runtime import Runtime

    return Runtime.load(args.model, args.device, args.dtype)


class Parser(argparse.ArgumentParser):
    """One line for a usage error, as for every other one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="weights above this go to several files, such as FILE-00001-of-00002-*, that move with FILE (default 5GB)",
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
