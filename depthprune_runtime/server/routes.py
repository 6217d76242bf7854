"""The small routes: models, tokens, health, version, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from depthprune_runtime.engine.errors import EngineDead
from depthprune_runtime.engine.values import refuse, token_ids, unicode_text
from depthprune_runtime.server.bodies import flag, text
from depthprune_runtime.server.chat import chat_ids
from depthprune_runtime.server.errors import ApiError
from depthprune_runtime.server.served import Served, served

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def _model(state: Served, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "depthprune_runtime",
        "root": state.names[0],
        "parent": None,
        "max_model_len": state.inputs.spec.max_position_embeddings,
    }


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    state = served(request)
    return JSONResponse({"object": "list", "data": [_model(state, name) for name in state.names]})


async def model(request: Request) -> Response:
    """`GET /v1/models/NAME`."""
    state = served(request)
    return JSONResponse(_model(state, state.check_model({"model": request.path_params["name"]})))


async def tokenize(request: Request) -> Response:
    """`POST /tokenize`: the ids of a prompt, or of a conversation."""
    state = served(request)
    body = await state.body(request)
    state.check_model(body)
    if "messages" in body:
        ids = await chat_ids(state.inputs, body)
    else:
        prompt = text(body, "prompt")
        if prompt is None:
            refuse("prompt", "a string, or messages in its place", None)
        unicode_text("prompt", prompt)
        tokenizer = state.inputs.require_tokenizer()
        ids = await asyncio.to_thread(tokenizer.encode, prompt, flag(body, "add_special_tokens", True))
    most = state.inputs.spec.max_position_embeddings
    return JSONResponse({"count": len(ids), "max_model_len": most, "tokens": ids})


async def detokenize(request: Request) -> Response:
    """`POST /detokenize`: the text of ids, special tokens included."""
    state = served(request)
    body = await state.body(request)
    state.check_model(body)
    ids = token_ids("tokens", body.get("tokens"), state.inputs.spec.vocab_size)
    tokenizer = state.inputs.require_tokenizer("ids have no text")
    return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, ids, False)})


async def health(request: Request) -> Response:
    """`GET /health`, `/ping`: 200 while the engine lives, 503 once it has stopped."""
    try:
        await served(request).engine.check_health()
    except EngineDead as error:
        raise ApiError(503, str(error)) from error
    return Response(status_code=200)


async def version(request: Request) -> Response:
    """`GET /version`."""
    return JSONResponse({"version": served(request).version})


async def metrics(request: Request) -> Response:
    """`GET /metrics`: for Prometheus; of a dead engine, what the server itself has counted."""
    state = served(request)
    try:
        stats = await state.engine.stats()
    except EngineDead:
        stats = None
    return Response(state.metrics.render(stats), media_type=_PROMETHEUS)
