"""`SamplingParams`: how to choose the next token. Names and defaults follow vLLM. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from depthprune_runtime.engine.stop_strings import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from depthprune_runtime.engine.values import as_integer, boolean, integer, listed_values, number, refuse, unicode_text

GREEDY_BELOW = 1e-5  # temperatures, as in vLLM
MAX_OUTPUTS = 16384  # of one prompt, as in vLLM
MAX_STOP_TOKEN_IDS = 1024
_MAX_TOKENS = 2**31 - 1
_MAX_TEMPERATURE = 1e4
_STOP = "non-empty strings"
_PENALTIES = (0.01, 100.0)  # float32 logits times or by these stay finite


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request. Values out of range are refused with InputError.

    The order is penalty, temperature, top_k, top_p, min_p, as in Transformers.

    Args:
        n: outputs per prompt, 1 to 16384; an engine allows `max_n`.
        temperature: 0 to 10000, greedy below 1e-5.
        top_p: probability mass that stays, above 0 to 1.
        top_k: tokens that stay; 0 or -1 keeps all.
        min_p: share of the largest probability, 0 to 1.
        repetition_penalty: 0.01 to 100; above 1 it lowers the logits of tokens seen in prompt or output.
        seed: 0 to 2**64 - 1; None draws a fresh one.
        stop: at most 256 strings of at most 4096 characters together, which end the output. A special token's text also
            ends it where skip_special_tokens leaves that token out.
        stop_token_ids: ids that end it, at most 1024.
        ignore_eos: go on after an end-of-sequence token.
        max_tokens: new tokens at most, cut to what the context leaves.
        logprobs: how many alternatives to report with each token; an engine allows `max_logprobs`.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string in the text.
        add_special_tokens: begin a text prompt with what the tokenizer adds, such as a BOS.
        split_special_tokens: read special tokens in a text prompt as ordinary text.
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
        temperature = number("temperature", self.temperature, 0.0, _MAX_TEMPERATURE)
        checked = {
            "n": integer("n", self.n, 1, MAX_OUTPUTS),
            "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
            "top_p": number("top_p", self.top_p, 0.0, 1.0, above=True),
            "top_k": integer("top_k", self.top_k, -1, _MAX_TOKENS, " (0 and -1: all)"),
            "min_p": number("min_p", self.min_p, 0.0, 1.0),
            "repetition_penalty": number("repetition_penalty", self.repetition_penalty, *_PENALTIES),
            "seed": None if self.seed is None else integer("seed", self.seed, 0, 2**64 - 1),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _stop_ids(self.stop_token_ids),
            "ignore_eos": boolean("ignore_eos", self.ignore_eos),
            "max_tokens": min(_at_least("max_tokens", self.max_tokens, 1), _MAX_TOKENS),
            "logprobs": None if self.logprobs is None else integer("logprobs", self.logprobs, 0, _MAX_TOKENS),
            "skip_special_tokens": boolean("skip_special_tokens", self.skip_special_tokens),
            "include_stop_str_in_output": boolean("include_stop_str_in_output", self.include_stop_str_in_output),
            "add_special_tokens": boolean("add_special_tokens", self.add_special_tokens),
            "split_special_tokens": boolean("split_special_tokens", self.split_special_tokens),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever form it was given in."""
        return self.stop if isinstance(self.stop, tuple) else tuple(self.stop)


class SamplingFields(TypedDict, total=False):
    """The fields of `SamplingParams`, all optional: its keyword arguments where a call takes them.

    max_new_tokens: another name of max_tokens, as Transformers calls it.
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | tuple[str, ...] | list[str]
    stop_token_ids: tuple[int, ...] | list[int]
    ignore_eos: bool
    max_tokens: int
    max_new_tokens: int
    logprobs: int | None
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    add_special_tokens: bool
    split_special_tokens: bool


def _at_least(name: str, value: object, least: int) -> int:
    found = as_integer(value)
    if found is None or found < least:
        refuse(name, f"an integer >= {least}", value)
    return found


def _stop_strings(stop: object) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else () if stop is None else listed_values("stop", stop, _STOP)
    for text in found:
        if not isinstance(text, str) or not text:
            refuse("stop", _STOP, stop)
        unicode_text("stop", text)
    if len(found) > MAX_STOP_STRINGS:
        refuse("stop", f"at most {MAX_STOP_STRINGS} strings", len(found))
    characters = sum(map(len, found))
    if characters > MAX_STOP_CHARACTERS:
        refuse("stop", f"at most {MAX_STOP_CHARACTERS} characters together", characters)
    return tuple(found)


def _stop_ids(ids: object) -> tuple[int, ...]:
    """Each once; whether the model has them is for `Inputs` to say."""
    given = () if ids is None else listed_values("stop_token_ids", ids, "a sequence of token ids")
    if len(given) > MAX_STOP_TOKEN_IDS:
        refuse("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids", len(given))
    return tuple(dict.fromkeys(_at_least("stop_token_ids", token, 0) for token in given))
