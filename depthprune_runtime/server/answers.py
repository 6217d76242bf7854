"""Answers of the two routes that generate, whole or as server-sent events. What a choice looks like is theirs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from depthprune_runtime.engine.errors import EngineDead
from depthprune_runtime.engine.outputs import CompletionOutput, OutputDelta, RequestOutput
from depthprune_runtime.server.errors import ApiError, as_api_error
from depthprune_runtime.server.generation import Generation, unless_gone
from depthprune_runtime.server.sampling import Wanted

_GONE = 499  # the client closed the connection, as nginx says it
Choice = dict[str, Any]


class Form(Protocol):
    """How a route writes choices. index: of the choice; prompt: its number among the request's prompts."""

    prefix: str  # of the answer's id
    whole_object: str
    piece_object: str

    def whole(self, index: int, prompt: int, output: CompletionOutput) -> Choice:
        """A finished choice."""

    def opening(self, index: int, prompt: int) -> Choice | None:
        """What begins a choice in a stream; None: nothing."""

    def piece(self, index: int, delta: OutputDelta) -> Choice:
        """News of a choice."""


@dataclass
class Counts:
    """Tokens of an answer so far."""

    prompt: int
    cached: int = 0
    generated: int = field(default=0)

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


async def answer(request: Request, generation: Generation, form: Form, model: str, wants: Wanted) -> Response:
    """The answer to `request`; a client that goes away ends its generation."""
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    if wants.stream:
        events = _events(generation, form, head | {"object": form.piece_object}, wants)
        return _Events(generation, events)
    results = await unless_gone(request, asyncio.create_task(generation.results()))
    if results is None:
        return Response(status_code=_GONE)
    return JSONResponse(head | {"object": form.whole_object} | _body(results, form, generation.params.n))


def _body(results: Sequence[RequestOutput], form: Form, n: int) -> dict[str, Any]:
    choices = [form.whole(p * n + o.index, p, o) for p, result in enumerate(results) for o in result.outputs]
    prompt = sum(len(r.prompt_token_ids) for r in results)
    cached = sum(r.num_cached_tokens for r in results)
    counts = Counts(prompt, cached, sum(len(o.token_ids) for r in results for o in r.outputs))
    return {"choices": choices, "usage": counts.to_json()}


class _Events(StreamingResponse):
    """Server-sent events; whatever ends them ends the generation."""

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _events(generation: Generation, form: Form, head: dict[str, Any], wants: Wanted) -> AsyncIterator[str]:
    n = generation.params.n
    counts = Counts(sum(len(s.prompt_token_ids) for s in generation.streams))
    begun: set[int] = set()
    try:
        async with contextlib.aclosing(generation.deltas()) as deltas:  # type: ignore[type-var]
            async for number, delta in deltas:
                index = number * n + delta.output_index
                counts.generated += len(delta.token_ids)
                if delta.result is not None:
                    counts.cached += delta.result.num_cached_tokens
                choices = []
                if index not in begun:
                    begun.add(index)
                    choices.append(form.opening(index, number))
                if delta.text or delta.finish_reason is not None or delta.logprobs:
                    choices.append(form.piece(index, delta))
                usage = {"usage": counts.to_json()} if wants.usage_always else {}
                for choice in choices:
                    if choice is not None:
                        yield _event(head | {"choices": [choice]} | usage)
        if wants.usage:
            yield _event(head | {"choices": [], "usage": counts.to_json()})
    except (ApiError, EngineDead) as error:  # the answer has begun: its status can say nothing any more
        yield _event(as_api_error(error).to_json())
    yield "data: [DONE]\n\n"
