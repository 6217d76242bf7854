"""A minimal serving backend around the engine: POST a prompt, read the tokens as they come.

    pip install starlette uvicorn
    python examples/embed_backend.py pruned.safetensors --port 8000
    curl -N localhost:8000/generate -d '{"prompt": "Once upon a time", "max_tokens": 32}'

The answer is server-sent events, one JSON object per step. A client that goes away aborts its request; a full queue
is answered with 503, a bad request with 400 and one line that says why. GET /health is 200 while the engine lives, and
503 once it has stopped: then start the server anew. SIGTERM waits --drain seconds for what runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from depthprune_runtime import (
    AsyncEngine,
    Engine,
    EngineDead,
    EngineFull,
    EngineOptions,
    InputError,
    Runtime,
    SamplingParams,
)
from depthprune_runtime.engine.async_engine import RequestStream

MAX_BODY = 4 << 20  # bytes of a request


class BodyTooLarge(Exception):  # noqa: N818
    """A request has more than MAX_BODY bytes."""


def app(engine: Engine) -> Starlette:
    """The application; it owns `engine` from its start to its shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(application: Starlette) -> AsyncIterator[None]:
        application.state.engine = AsyncEngine(engine)
        try:
            yield
        finally:
            await application.state.engine.close()

    routes = [Route("/generate", generate, methods=["POST"]), Route("/health", health), Route("/stats", stats)]
    return Starlette(routes=routes, lifespan=lifespan)


async def generate(request: Request) -> Response:
    try:
        options = json.loads(await _body(request))
        prompt, priority = options.pop("prompt"), options.pop("priority", 0)
        params = SamplingParams(**options)
    except BodyTooLarge as error:
        return _refusal(413, str(error))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # InputError is a ValueError
        return _refusal(400, f"expected a JSON object with a prompt and sampling parameters: {error}")
    try:
        stream = await request.app.state.engine.submit(prompt, params, priority=priority)
    except InputError as error:
        return _refusal(400, str(error))
    except (EngineFull, EngineDead) as error:
        return _refusal(503, str(error))
    return StreamingResponse(_events(stream), media_type="text/event-stream")


async def _body(request: Request) -> bytes:
    """The whole body, read only as far as it may go."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise BodyTooLarge(f"body: expected at most {MAX_BODY} bytes, got more")
    return bytes(body)


async def _events(stream: RequestStream) -> AsyncIterator[str]:
    try:
        async for delta in stream:
            event: dict[str, Any] = {"text": delta.text, "token_ids": delta.token_ids}
            if delta.finish_reason is not None:
                event |= {"index": delta.output_index, "finish_reason": delta.finish_reason, "error": delta.error}
            yield f"data: {json.dumps(event)}\n\n"
    except EngineDead as error:  # the answer has begun: its status can say nothing any more
        yield f"data: {json.dumps({'finish_reason': 'error', 'error': str(error)})}\n\n"
    finally:
        stream.abort()  # the client has gone, or the output has ended


async def health(request: Request) -> Response:
    try:
        await request.app.state.engine.check_health()
    except EngineDead as error:
        return _refusal(503, str(error))
    return JSONResponse({"status": "ok"})


async def stats(request: Request) -> Response:
    try:
        return JSONResponse((await request.app.state.engine.stats()).to_json())
    except EngineDead as error:
        return _refusal(503, str(error))


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    default = EngineOptions()
    parser.add_argument("--kv-memory", default=default.kv_memory, help='of the KV cache, such as "2GiB"')
    parser.add_argument("--max-num-seqs", type=int, default=default.max_num_seqs, help="outputs running at once")
    parser.add_argument("--max-waiting", type=int, default=default.max_waiting, help="outputs in the waiting queue")
    parser.add_argument("--drain", type=int, default=10, help="seconds that SIGTERM waits for what runs (default 10)")
    args = parser.parse_args()
    try:
        options = EngineOptions(args.kv_memory, max_num_seqs=args.max_num_seqs, max_waiting=args.max_waiting)
        engine = Runtime.load(args.model).engine(options)
    except InputError as error:
        raise SystemExit(f"embed_backend: {error}") from error
    uvicorn.run(app(engine), host=args.host, port=args.port, timeout_graceful_shutdown=args.drain)


if __name__ == "__main__":
    main()
