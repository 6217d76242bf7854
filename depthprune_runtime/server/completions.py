"""`POST /v1/completions`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from depthprune_runtime.engine.outputs import CompletionOutput, OutputDelta
from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.prompts import listed
from depthprune_runtime.server.answers import Choice, answer
from depthprune_runtime.server.bodies import flag
from depthprune_runtime.server.errors import ApiError
from depthprune_runtime.server.generation import Generation
from depthprune_runtime.server.logprobs import completion_logprobs
from depthprune_runtime.server.sampling import completion_params, refuse_unserved, wanted
from depthprune_runtime.server.served import served


class CompletionForm:
    """Choices of /v1/completions. echoes: text of each prompt, where it is to begin its choices."""

    prefix = "cmpl"
    whole_object = piece_object = "text_completion"

    def __init__(self, params: SamplingParams, echoes: list[str] | None) -> None:
        self._count = params.logprobs
        self._echoes = echoes
        self._offsets: dict[int, int] = {}  # of the next token, by choice

    def whole(self, index: int, prompt: int, output: CompletionOutput) -> Choice:
        echo = "" if self._echoes is None else self._echoes[prompt]
        logprobs = None
        if self._count is not None:
            logprobs = completion_logprobs(output.token_ids, output.logprobs or (), self._count, 0)
        return {
            "index": index,
            "text": echo + output.text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def opening(self, index: int, prompt: int) -> Choice | None:
        if self._echoes is None:
            return None
        text = self._echoes[prompt]
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def piece(self, index: int, delta: OutputDelta) -> Choice:
        logprobs = None
        if self._count is not None and delta.logprobs is not None:
            offset = self._offsets.get(index, 0)
            logprobs = completion_logprobs(delta.token_ids, delta.logprobs, self._count, offset)
            self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        return {
            "index": index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }


async def completions(request: Request) -> Response:
    """Continue a prompt, or each of several."""
    state = served(request)
    body = await state.body(request)
    model = state.check_model(body)
    refuse_unserved(body)
    wants = wanted(body)
    params = completion_params(body, state.inputs.default_sampling_params)
    echo = flag(body, "echo")
    if echo and params.logprobs is not None:
        raise ApiError(400, "echo: expected no logprobs beside it, which are not known for prompts", "echo")
    prompts = [prompt for _, prompt in listed(body.get("prompt"))]
    generation = await Generation.start(state, prompts, params, body.get("priority"))
    echoes = None
    if echo:
        tokenizer = state.inputs.tokenizer
        echoes = [
            s.prompt if s.prompt is not None else tokenizer.decode(s.prompt_token_ids) if tokenizer else ""
            for s in generation.streams
        ]
    return await answer(request, generation, CompletionForm(params, echoes), model, wants)
