"""Fields of a request's body -> `SamplingParams`. Unknown fields are left out, as clients send many."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.values import integer
from depthprune_runtime.server.bodies import Body, entry, flag
from depthprune_runtime.server.errors import ApiError

_SHARED = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "allowed_token_ids", "bad_words", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
)  # fmt: skip
_NOT_SERVED = (
    "best_of", "use_beam_search", "suffix", "prompt_logprobs", "structured_outputs", "chat_template",
    "truncate_prompt_tokens",
)  # fmt: skip
_MOST_LOGPROBS = 2**31 - 1


@dataclass(frozen=True)
class Wanted:
    """How a client wants its answer. usage, usage_always: in the last, in every chunk of a stream."""

    stream: bool
    usage: bool
    usage_always: bool


def wanted(body: Body) -> Wanted:
    """`stream` and `stream_options` of a body."""
    stream = flag(body, "stream")
    options = entry(body, "stream_options")
    if options and not stream:
        raise ApiError(400, "stream_options: expected none without stream", "stream_options")
    return Wanted(stream, flag(options, "include_usage"), flag(options, "continuous_usage_stats"))


def refuse_unserved(body: Body) -> None:
    """Refuse fields whose neglect would change what comes out."""
    for name in _NOT_SERVED:
        value = body.get(name)
        if value is None or value is False or value == "" or (name == "best_of" and value == (body.get("n") or 1)):
            continue
        raise ApiError(400, f"{name}: this server does not serve it; leave it out", name)
    form = entry(body, "response_format").get("type", "text")
    if form != "text":
        raise ApiError(400, 'response_format: expected type "text"; this server serves no other', "response_format")


def completion_params(body: Body, default: SamplingParams) -> SamplingParams:
    """Parameters of /v1/completions. InputError for values out of range."""
    fields = _given(body, (*_SHARED, "max_tokens", "logprobs", "add_special_tokens"))
    return dataclasses.replace(_base(default, 16), **fields)


def chat_params(body: Body, default: SamplingParams) -> SamplingParams:
    """Parameters of /v1/chat/completions; without a limit, the answer may fill the context."""
    fields = _given(body, _SHARED)
    most = body.get("max_completion_tokens")
    most = body.get("max_tokens") if most is None else most
    if most is not None:
        fields["max_tokens"] = most
    count = body.get("top_logprobs")
    if flag(body, "logprobs"):
        fields["logprobs"] = 0 if count is None else integer("top_logprobs", count, 0, _MOST_LOGPROBS)
    elif count:
        raise ApiError(400, "top_logprobs: expected logprobs to be true beside it", "top_logprobs")
    return dataclasses.replace(_base(default, None), **fields)


def _given(body: Body, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: body[name] for name in names if body.get(name) is not None}


def _base(default: SamplingParams, max_tokens: int | None) -> SamplingParams:
    """What the model's own file asks for; where that is nothing, OpenAI's temperature of 1."""
    temperature = 1.0 if default.greedy else default.temperature
    return dataclasses.replace(default, temperature=temperature, max_tokens=max_tokens)
