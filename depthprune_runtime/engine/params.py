"""`SamplingParams`: how to choose the next token. Names and defaults follow vLLM. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from depthprune_runtime.engine.stop_strings import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from depthprune_runtime.errors import InputError


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise InputError(f"{name}: expected {expected}, got {got!r}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request.

    temperature: 0 is greedy; top_k: 0 or -1 keeps all; top_p, min_p: probability mass and share of the
    largest probability; repetition_penalty: > 1 lowers the logits of tokens seen in prompt or output;
    seed: None draws a fresh one; stop: at most 256 strings of at most 4096 characters together, which
    end the output (left out of it unless include_stop_str_in_output; a special token's text also ends it where
    skip_special_tokens leaves that token out); stop_token_ids: ids that end it; max_tokens: new tokens at most;
    logprobs: how many alternatives to report with each token; n: outputs per prompt; add_special_tokens: begin a text
    prompt with what the tokenizer adds, such as a BOS; split_special_tokens: read special tokens in a text prompt as
    ordinary text.
    The order is penalty, temperature, top_k, top_p, min_p, as in Transformers.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = field(default_factory=tuple)
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    add_special_tokens: bool = True
    split_special_tokens: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _require(_whole(self.n, 1), "n", "an integer >= 1", self.n)
        _require(_number(self.temperature) and self.temperature >= 0, "temperature", "a number >= 0", self.temperature)
        _require(_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        _require(_whole(self.top_k, -1), "top_k", "an integer >= -1 (0 and -1: all)", self.top_k)
        _require(_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number in [0, 1]", self.min_p)
        penalty = self.repetition_penalty
        _require(_number(penalty) and penalty > 0, "repetition_penalty", "a number > 0", penalty)
        _require(self.seed is None or _whole(self.seed, 0), "seed", "None or an integer >= 0", self.seed)
        _require(all(isinstance(s, str) and s for s in stop), "stop", "non-empty strings", self.stop)
        _require(len(stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings", len(stop))
        characters = sum(map(len, stop))
        _require(
            characters <= MAX_STOP_CHARACTERS, "stop", f"at most {MAX_STOP_CHARACTERS} characters together", characters
        )
        _require(all(_whole(i, 0) for i in self.stop_token_ids), "stop_token_ids", "token ids", self.stop_token_ids)
        _require(_whole(self.max_tokens, 1), "max_tokens", "an integer >= 1", self.max_tokens)
        _require(
            self.logprobs is None or _whole(self.logprobs, 0), "logprobs", "None or an integer >= 0", self.logprobs
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self.stop if isinstance(self.stop, tuple) else tuple(self.stop)
