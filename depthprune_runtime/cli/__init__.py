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
from depthprune_runtime.cli.export import add_export
from depthprune_runtime.cli.heal import add_heal
from depthprune_runtime.cli.interrupt import Written
from depthprune_runtime.cli.parser import Parser
from depthprune_runtime.cli.prune import add_import, add_prune
from depthprune_runtime.cli.quantize import add_quantize
from depthprune_runtime.cli.use import add_evaluate, add_generate, add_inspect, add_perplexity
from depthprune_runtime.errors import InputError, printable

_INTERRUPTED = 130
_LONGEST = 2000  # characters of a message


def build_parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    common.add_argument("--quiet", "-q", action="store_true", help="no progress bars")
    parser = Parser(prog="depthprune", description="Make large language models shallower, and run the result.")
    parser.add_argument("--version", action="version", version=f"depthprune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    add_prune(commands, common)
    add_quantize(commands, common)
    add_heal(commands, common)
    add_import(commands, common)
    add_export(commands, common)
    add_inspect(commands, common)
    add_generate(commands, common)
    add_perplexity(commands, common)
    add_evaluate(commands, common)
    return parser


class _Printable(logging.Formatter):
    """Log lines may hold names out of files."""

    def format(self, record: logging.LogRecord) -> str:
        return f"depthprune: {printable(record.getMessage(), _LONGEST)}"


def _say(message: object) -> None:
    """One line on stderr, whatever the message holds."""
    print(f"depthprune: {printable(' '.join(str(message).split()), _LONGEST)}", file=sys.stderr)


def _terminate(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 bad input or a failed read or write, one line on stderr; 2 usage; 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    written = None
    try:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Printable())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        signal.signal(signal.SIGTERM, _terminate)  # so that temporary files are removed
        parser = build_parser()
        if not arguments:
            parser.print_help()
            return 0
        args = parser.parse_args(arguments)
        written = Written(args)
        args.run(args)
        sys.stdout.flush()
    except InputError as error:
        _say(error)
        return 1
    except BrokenPipeError:  # the reader of stdout has gone, as in `depthprune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        name = f"{Path(str(error.filename))}: " if error.filename else ""
        _say(f"{name}{error.strerror or error}")
        return 1
    except MemoryError:
        _say("out of memory; use a smaller model, window or dtype")
        return 1
    except KeyboardInterrupt:
        _say(f"interrupted; {'nothing was written' if written is None else written.report()}")
        return _INTERRUPTED
    return 0
