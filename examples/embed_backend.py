"""The server inside a program of one's own: its application is ASGI, and takes further routes.

pip install 'depthprune_runtime[serve]'
python examples/embed_backend.py pruned.safetensors
curl localhost:8000/stats
"""

from __future__ import annotations

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from depthprune_runtime import EngineOptions, InputError, Runtime, __version__
from depthprune_runtime.server.app import application
from depthprune_runtime.server.options import ServerOptions
from depthprune_runtime.server.served import served


async def stats(request: Request) -> JSONResponse:
    return JSONResponse((await served(request).engine.stats()).to_json())


def app(model: str) -> Starlette:
    engine = Runtime.load(model).engine(EngineOptions(kv_memory=0.2, max_num_seqs=64))
    made = application(engine, ServerOptions(max_body="1MiB"), "model", __version__)
    made.router.routes.append(Route("/stats", stats))
    return made


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: embed_backend.py MODEL")
    try:
        made = app(sys.argv[1])
    except InputError as error:
        raise SystemExit(f"embed_backend: {error}") from error
    uvicorn.run(made, host="127.0.0.1", port=8000, timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
