"""`depthprune serve`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from depthprune_runtime import __version__
from depthprune_runtime.cli.common import add_activations, add_placement, load
from depthprune_runtime.cli.flags import add_flags, given
from depthprune_runtime.cli.parser import Parser
from depthprune_runtime.errors import InputError, printable

_KEYS = "DEPTHPRUNE_API_KEY"


def _serve(args: argparse.Namespace) -> None:
    from depthprune_runtime.engine.options import EngineOptions
    from depthprune_runtime.server.options import ServerOptions

    keys = [*(args.api_key or ()), *filter(None, os.environ.get(_KEYS, "").split(","))]
    names: dict[str, Any] = {
        "model_names": args.served_model_name or (),
        "api_keys": keys,
        "cors_origins": args.cors_origin or (),
    }
    options = ServerOptions(**given(args, ServerOptions), **names)
    engine_options = EngineOptions(**given(args, EngineOptions))
    try:
        from depthprune_runtime.server.app import application
        from depthprune_runtime.server.run import serve
    except ModuleNotFoundError as error:
        raise InputError(f"serve: needs {error.name}; pip install 'depthprune_runtime[serve]'") from error
    name = Path(args.model).stem or str(args.model)

    def told(address: str) -> None:
        shown = printable(f"serving {', '.join(options.model_names or (name,))} on {address}", 500)
        print(f"depthprune: {shown}", file=sys.stderr, flush=True)

    serve(lambda: application(load(args).engine(engine_options), options, name, __version__), options, told)


def add_serve(commands: Any, common: Parser) -> None:
    from depthprune_runtime.engine.options import EngineOptions
    from depthprune_runtime.server.options import ServerOptions

    p = commands.add_parser("serve", parents=[common], help="answer requests over HTTP, as OpenAI's API does")
    p.add_argument("model", metavar="MODEL")
    add_flags(p, ServerOptions)
    p.add_argument("--served-model-name", action="append", metavar="NAME", help="what clients call it; repeatable")
    p.add_argument(
        "--api-key", action="append", metavar="KEY", help=f"answer only who brings it; repeatable (or ${_KEYS}: K1,K2)"
    )
    p.add_argument("--cors-origin", action="append", metavar="URL", help="web page that may read answers; repeatable")
    add_flags(p.add_argument_group("engine"), EngineOptions)
    add_placement(p, "to compute in")
    add_activations(p)
    p.set_defaults(run=_serve)
