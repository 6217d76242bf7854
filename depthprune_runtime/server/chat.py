"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from depthprune_runtime.engine.inputs import Inputs
from depthprune_runtime.engine.outputs import CompletionOutput, OutputDelta
from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.values import refuse
from depthprune_runtime.server.answers import Choice, answer
from depthprune_runtime.server.bodies import Body
from depthprune_runtime.server.errors import ApiError
from depthprune_runtime.server.generation import Generation
from depthprune_runtime.server.logprobs import chat_logprobs
from depthprune_runtime.server.sampling import chat_params, refuse_unserved, wanted
from depthprune_runtime.server.served import served
from depthprune_runtime.text.tokenizer import ChatFields

_OF_TEMPLATE = ("tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class ChatForm:
    """Choices of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"

    def __init__(self, params: SamplingParams) -> None:
        self._count = params.logprobs

    def whole(self, index: int, prompt: int, output: CompletionOutput) -> Choice:
        logprobs = None
        if self._count is not None:
            logprobs = chat_logprobs(output.token_ids, output.logprobs or (), self._count)
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text},
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def opening(self, index: int, prompt: int) -> Choice | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, delta: OutputDelta) -> Choice:
        logprobs = None
        if self._count is not None and delta.logprobs is not None:
            logprobs = chat_logprobs(delta.token_ids, delta.logprobs, self._count)
        return {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }


async def chat_ids(inputs: Inputs, body: Body) -> list[int]:
    """Token ids of a conversation, rendered with the model's own template in a thread of its own.

    Args:
        inputs: of the model.
        body: with `messages`, and what templates read besides.

    Returns:
        The ids.

    Raises:
        InputError: for messages that the template does not take, and for a model without template.
        ApiError: 400 for a choice of tools that only a grammar could keep.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        refuse("messages", "a list of messages, not empty", messages)
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise ApiError(400, 'tool_choice: expected "none" or "auto"; this server serves no other', "tool_choice")
    options: dict[str, Any] = {name: body[name] for name in _OF_TEMPLATE if body.get(name) is not None}
    tokenizer = inputs.require_tokenizer("it cannot chat; use /v1/completions with token ids")
    _, ids = await asyncio.to_thread(tokenizer.encode_chat, messages, **cast(ChatFields, options))
    return ids


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    state = served(request)
    body = await state.body(request)
    model = state.check_model(body)
    refuse_unserved(body)
    wants = wanted(body)
    params = chat_params(body, state.inputs.default_sampling_params)
    ids = await chat_ids(state.inputs, body)
    generation = await Generation.start(state, [ids], params, body.get("priority"))
    return await answer(request, generation, ChatForm(params), model, wants)
