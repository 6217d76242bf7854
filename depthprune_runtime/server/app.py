"""The ASGI application: routes, who may use them, and errors as clients of OpenAI's API read them."""

from __future__ import annotations

import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from depthprune_runtime.engine.async_engine import AsyncEngine
from depthprune_runtime.engine.engine import Engine
from depthprune_runtime.engine.errors import EngineDead, EngineFull
from depthprune_runtime.errors import InputError
from depthprune_runtime.server import routes
from depthprune_runtime.server.chat import chat_completions
from depthprune_runtime.server.completions import completions
from depthprune_runtime.server.errors import ApiError, as_api_error
from depthprune_runtime.server.metrics import Metrics
from depthprune_runtime.server.options import ServerOptions
from depthprune_runtime.server.served import Served

_OPEN = ("/health", "/ping", "/version", "/metrics")  # what asks for no key
_RETRY_SECONDS = "1"
_log = logging.getLogger("depthprune_runtime")


def application(engine: Engine, options: ServerOptions, name: str, version: str) -> Starlette:
    """An application that owns `engine` from its start to its shutdown.

    Args:
        engine: with no requests yet.
        options: whom it answers, and how much it takes.
        name: of the model, where options have none.
        version: what `/version` says.

    Returns:
        The application, for any ASGI server.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        names = options.model_names or (name,)
        running = AsyncEngine(engine)
        app.state.served = Served(running, engine.inputs, options, Metrics(names[0]), names, int(time.time()), version)
        try:
            yield
        finally:
            await running.close()

    middleware = []
    if options.cors_origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
        )
    if options.api_keys:
        middleware.append(Middleware(_Keys, keys=options.api_keys))
    refusals = dict.fromkeys((ApiError, InputError, EngineFull, EngineDead), _refuse)
    handlers = {**refusals, HTTPException: _refuse_route, ClientDisconnect: _ignore, Exception: _fail}
    return Starlette(routes=_routes(), lifespan=lifespan, middleware=middleware, exception_handlers=handlers)


def _routes() -> list[Route]:
    return [
        Route("/v1/models", routes.models),
        Route("/v1/models/{name:path}", routes.model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/tokenize", routes.tokenize, methods=["POST"]),
        Route("/detokenize", routes.detokenize, methods=["POST"]),
        Route("/health", routes.health),
        Route("/ping", routes.health, methods=["GET", "POST"]),
        Route("/version", routes.version),
        Route("/metrics", routes.metrics),
    ]


class _Keys:
    """Answers only those that bring a key."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._wanted = [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not sum(hmac.compare_digest(given, wanted) for wanted in self._wanted):  # all are compared
                refusal = ApiError(401, "expected the header `Authorization: Bearer KEY` with a key of this server")
                await JSONResponse(refusal.to_json(), 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _refuse(request: Request, error: Exception) -> Response:
    told = as_api_error(error)
    headers = {"Retry-After": _RETRY_SECONDS} if isinstance(error, EngineFull) else None
    return JSONResponse(told.to_json(), told.status, headers)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).to_json(), error.status_code, error.headers)


async def _ignore(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _fail(request: Request, error: Exception) -> Response:
    _log.error("%s failed: %r", request.url.path, error)
    return JSONResponse(ApiError(500, "the server failed at this request; its log says more").to_json(), 500)
