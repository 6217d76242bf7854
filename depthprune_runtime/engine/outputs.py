"""What generation returns. Names follow vLLM; everything prints as its text. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token under the model's own distribution, before any sampling parameter."""

    logprob: float
    rank: int  # 1 is the most likely
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One output of a request.

    Args:
        index: from 0, among the n outputs of the prompt.
        text: without the token or stop string that ended it.
        token_ids: with the token that ended it.
        cumulative_logprob: sum over token_ids, in nats; None if no log-probabilities were asked for.
        logprobs: one entry a token, id -> its log-probability; None if not asked for.
        finish_reason: `stop` (end-of-sequence, stop id or stop string), `length`, `abort` (by the caller) or `error`;
            None while it runs.
        stop_reason: the stop id or stop string; None at an end-of-sequence token and for other reasons.
        error: why it failed.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: str | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its outputs.

    Args:
        request_id: as it was queued; from `Runtime` the number of the prompt.
        prompt: its text; None where only token ids were given.
        prompt_token_ids: what the model was given.
        outputs: n of them.
        finished: whether all have ended.
        num_cached_tokens: prompt tokens whose keys and values were found in the cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Text of the first output."""
        return self.outputs[0].text

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> dict[str, Any]:
        """All fields as what `json.dumps` takes."""
        return dataclasses.asdict(self)


class RequestOutputs(list[RequestOutput]):
    """Outputs in the order of the prompts: a list, as vLLM returns, that prints as text."""

    @property
    def text(self) -> str:
        """Texts of the first outputs, one prompt after another."""
        return "\n".join(o.text for o in self)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StreamChunk:
    """News of one running output: text and tokens since the last chunk. error: why it failed alone."""

    request_index: int
    output_index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None = None

    def __str__(self) -> str:
        return self.text


class OutputDelta(NamedTuple):
    """What one step brought one output. Everything is new: concatenated, the deltas are the output.

    text: may be empty while a character or a possible stop string is incomplete; logprobs: one entry a token, None
    if not asked for; finish_reason, stop_reason, error: as in `CompletionOutput`, None while it runs;
    result: with the delta that ends the last output of the request, the whole of it.
    """

    request_id: str
    output_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: str | None
    result: RequestOutput | None

    @property
    def finished(self) -> bool:
        """Whether the whole request has ended."""
        return self.result is not None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class EngineStats:
    """State and totals of an engine. Outputs are counted, not requests: n of them share a prompt.

    num_prompt_tokens counts tokens of admitted prompts, num_cached_tokens those of them that were found in the
    cache (both include recomputation after a preemption).
    """

    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_free_kv_blocks: int
    num_cached_kv_blocks: int
    num_steps: int
    num_finished: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    @property
    def kv_usage(self) -> float:
        """Share of the kv_blocks that requests hold."""
        return 1.0 - self.num_free_kv_blocks / self.num_kv_blocks

    @property
    def prefix_hit_rate(self) -> float:
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "kv_usage": self.kv_usage, "prefix_hit_rate": self.prefix_hit_rate}
