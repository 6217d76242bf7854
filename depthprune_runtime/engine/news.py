"""What a step brought a request, as its `OutputDelta`, and at its end its `RequestOutput`."""

from __future__ import annotations

from depthprune_runtime.engine.inputs import Inputs, RequestGroup
from depthprune_runtime.engine.outputs import Logprob, OutputDelta, RequestOutput
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.samplers import Likely


def fail_in_text(request: Request, error: Exception) -> None:
    """End a request whose tokens give no text."""
    request.fail(f"its text cannot be decoded: {type(error).__name__}: {error}")


def new_text(request: Request) -> str:
    """Text since the last call; where that raises, the request has failed."""
    try:
        return request.take_news()
    except Exception as error:
        fail_in_text(request, error)
        return ""


def alternatives(likely: Likely | None, inputs: Inputs) -> dict[int, Logprob] | None:
    """The most likely tokens of one position, by id."""
    if likely is None:
        return None
    return {t: Logprob(p, rank, inputs.token_text(t)) for t, p, rank in likely}


def output_delta(request: Request, text: str, new: tuple[int, ...], result: RequestOutput | None) -> OutputDelta:
    """News of a request. new: token ids; result: with the news that end the last output of its prompt."""
    logprobs = None
    if request.params.logprobs is not None:
        logprobs = tuple(request.logprobs[len(request.logprobs) - len(new) :]) if new else ()
    return OutputDelta(
        request.request_id,
        request.output_index,
        text,
        new,
        logprobs,
        request.finish_reason,
        request.stop_reason,
        request.error,
        result,
    )


def group_result(group: RequestGroup) -> RequestOutput:
    """The whole of a prompt whose outputs have ended."""
    outputs = tuple(r.output() for r in group.requests)
    cached = group.requests[0].num_cached_tokens
    return RequestOutput(group.request_id, group.prompt, group.prompt_ids, outputs, True, cached)
