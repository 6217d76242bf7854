"""`depthprune`: thin commands over the public functions. Results on stdout, progress and errors on stderr."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from depthprune_runtime import __version__
from depthprune_runtime.cli.common import Parser
from depthprune_runtime.cli.prune import add_import, add_prune
from depthprune_runtime.cli.quantize import add_quantize
from depthprune_runtime.cli.use import add_evaluate, add_generate, add_inspect, add_perplexity
from depthprune_runtime.errors import InputError

_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    common.add_argument("--quiet", "-q", action="store_true", help="no progress bars")
    parser = Parser(prog="depthprune", description="Make large language models shallower, and run the result.")
    parser.add_argument("--version", action="version", version=f"depthprune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    add_prune(commands, common)
    add_quantize(commands, common)
    add_import(commands, common)
    add_inspect(commands, common)
    add_generate(commands, common)
    add_perplexity(commands, common)
    add_evaluate(commands, common)
    return parser


def _terminate(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 bad input or a failed read or write, one line on stderr; 2 usage; 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="depthprune: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _terminate)  # so that temporary files are removed
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except InputError as error:
        print(f"depthprune: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of stdout has gone, as in `depthprune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        name = f"{Path(str(error.filename))}: " if error.filename else ""
        print(f"depthprune: {name}{error.strerror or error}", file=sys.stderr)
        return 1
    except MemoryError:
        print("depthprune: out of memory; use a smaller model, window or dtype", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("depthprune: interrupted; nothing was written", file=sys.stderr)
        return _INTERRUPTED
    return 0
