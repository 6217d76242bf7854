"""What generation returns. Names follow vLLM; everything prints as its text. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token under the model's own distribution, before any sampling parameter."""

    logprob: float
    rank: int  # 1 is the most likely
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One output of a request.

    finish_reason: `stop` (end-of-sequence, stop id or stop string; stop_reason says which of the latter
    two) or `length`. token_ids include the token that ended the output, text does not.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its outputs."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool

    @property
    def text(self) -> str:
        """Text of the first output."""
        return self.outputs[0].text

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> dict[str, Any]:
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
    """News of one running output: text and tokens since the last chunk."""

    request_index: int
    output_index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None

    def __str__(self) -> str:
        return self.text
