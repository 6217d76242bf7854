"""`SamplingParams`: how to choose the next token. Names and defaults follow vLLM. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from depthprune_runtime.engine.stop_strings import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from depthprune_runtime.engine.values import as_integer, boolean, integer, listed_values, number, refuse, unicode_text
from depthprune_runtime.errors import InputError

GREEDY_BELOW = 1e-5  # temperatures, as in vLLM
MAX_OUTPUTS = 16384  # of one prompt, as in vLLM
MAX_STOP_TOKEN_IDS = 1024
_MAX_TOKENS = 2**31 - 1
_MAX_TEMPERATURE = 1e4
_STRINGS = "non-empty strings"
_MAX_BIAS = 100.0  # as in vLLM
ALL_LOGPROBS = -1
TokenBias = Mapping[int, float] | Mapping[str, float] | tuple[tuple[int, float], ...]  # ids of JSON are strings
_PENALTIES = (0.01, 100.0)  # float32 logits times or by these stay finite


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request. Values out of range are refused with InputError.

    The order is vLLM's: allowed_token_ids, bad_words, min_tokens, logit_bias, penalties, temperature, top_k, top_p,
    min_p.

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
        max_tokens: new tokens at most, cut to what the context leaves; None: as many as that.
        min_tokens: new tokens before anything but max_tokens may end it.
        presence_penalty: -2 to 2; taken from the logits of tokens that the output has.
        frequency_penalty: -2 to 2; the same for every time that it has them.
        logit_bias: token id -> -100 to 100, added to its logit. Kept as pairs.
        allowed_token_ids: the only tokens that may come; None: all.
        bad_words: at most 256 strings of at most 4096 characters together, whose last token never follows the others.
        logprobs: how many alternatives to report with each token, -1 for all; an engine allows `max_logprobs`.
        detokenize: give text; without it, stop strings cannot be seen.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: keep the spaces that some decoders write between two of them.
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
    max_tokens: int | None = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: TokenBias | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] = ()
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    add_special_tokens: bool = True
    split_special_tokens: bool = False

    def __post_init__(self) -> None:
        most, wanted = self.max_tokens, self.logprobs
        temperature = number("temperature", self.temperature, 0.0, _MAX_TEMPERATURE)
        checked = {
            "n": integer("n", self.n, 1, MAX_OUTPUTS),
            "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
            "top_p": number("top_p", self.top_p, 0.0, 1.0, above=True),
            "top_k": integer("top_k", self.top_k, -1, _MAX_TOKENS, " (0 and -1: all)"),
            "min_p": number("min_p", self.min_p, 0.0, 1.0),
            "repetition_penalty": number("repetition_penalty", self.repetition_penalty, *_PENALTIES),
            "seed": None if self.seed is None else integer("seed", self.seed, 0, 2**64 - 1),
            "stop": _strings("stop", self.stop),
            "stop_token_ids": _stop_ids(self.stop_token_ids),
            "ignore_eos": boolean("ignore_eos", self.ignore_eos),
            "max_tokens": None if most is None else min(_at_least("max_tokens", most, 1), _MAX_TOKENS),
            "min_tokens": integer("min_tokens", self.min_tokens, 0, _MAX_TOKENS),
            "presence_penalty": number("presence_penalty", self.presence_penalty, -2.0, 2.0),
            "frequency_penalty": number("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            "logit_bias": None if self.logit_bias is None else _bias(self.logit_bias),
            "allowed_token_ids": None if self.allowed_token_ids is None else _allowed(self.allowed_token_ids),
            "bad_words": _strings("bad_words", self.bad_words),
            "logprobs": None if wanted is None else integer("logprobs", wanted, ALL_LOGPROBS, _MAX_TOKENS),
            "detokenize": boolean("detokenize", self.detokenize),
            "skip_special_tokens": boolean("skip_special_tokens", self.skip_special_tokens),
            "spaces_between_special_tokens": boolean(
                "spaces_between_special_tokens", self.spaces_between_special_tokens
            ),
            "include_stop_str_in_output": boolean("include_stop_str_in_output", self.include_stop_str_in_output),
            "add_special_tokens": boolean("add_special_tokens", self.add_special_tokens),
            "split_special_tokens": boolean("split_special_tokens", self.split_special_tokens),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            refuse("min_tokens", f"at most max_tokens {self.max_tokens}", self.min_tokens)
        if self.stop and not self.detokenize:
            raise InputError("stop: expected none without detokenize, for no text is looked at; use stop_token_ids")

    @property
    def adjusts(self) -> bool:
        """Whether logits change before a token is chosen from them (`engine.adjustments`)."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.min_tokens > 0
            or bool(self.logit_bias)
            or self.allowed_token_ids is not None
            or bool(self.bad_words)
        )

    @property
    def bias_of_tokens(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs."""
        return self.logit_bias if isinstance(self.logit_bias, tuple) else ()

    @property
    def named_ids(self) -> dict[str, Sequence[int]]:
        """Parameter -> the token ids in it, which the model must have."""
        biased = [token for token, _ in self.bias_of_tokens]
        allowed = self.allowed_token_ids or ()
        return {"stop_token_ids": self.stop_token_ids, "allowed_token_ids": allowed, "logit_bias": biased}

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
    max_tokens: int | None
    max_new_tokens: int | None
    min_tokens: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: TokenBias | None
    allowed_token_ids: tuple[int, ...] | list[int] | None
    bad_words: tuple[str, ...] | list[str]
    logprobs: int | None
    detokenize: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    include_stop_str_in_output: bool
    add_special_tokens: bool
    split_special_tokens: bool


def _at_least(name: str, value: object, least: int) -> int:
    found = as_integer(value)
    if found is None or found < least:
        refuse(name, f"an integer >= {least}", value)
    return found


def _strings(name: str, value: object) -> tuple[str, ...]:
    """One string or several, within the limits of stop strings."""
    found = (value,) if isinstance(value, str) else () if value is None else listed_values(name, value, _STRINGS)
    for text in found:
        if not isinstance(text, str) or not text:
            refuse(name, _STRINGS, value)
        unicode_text(name, text)
    if len(found) > MAX_STOP_STRINGS:
        refuse(name, f"at most {MAX_STOP_STRINGS} strings", len(found))
    characters = sum(map(len, found))
    if characters > MAX_STOP_CHARACTERS:
        refuse(name, f"at most {MAX_STOP_CHARACTERS} characters together", characters)
    return tuple(found)


def _bias(value: object) -> tuple[tuple[int, float], ...]:
    """Pairs, in the order of their ids; whether the model has them is for `Inputs` to say."""
    what = f"token ids with numbers from {-_MAX_BIAS:g} to {_MAX_BIAS:g}"
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | tuple) or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):  # type: ignore[attr-defined]
        refuse("logit_bias", what, value)
    found: dict[int, float] = {}
    for key, bias in pairs:  # type: ignore[attr-defined]
        short = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        token = _at_least("logit_bias", int(key) if short else key, 0)
        found[token] = number("logit_bias", bias, -_MAX_BIAS, _MAX_BIAS)
    return tuple(sorted(found.items()))


def _allowed(ids: object) -> tuple[int, ...]:
    given = listed_values("allowed_token_ids", ids, "a sequence of token ids")
    if not given:
        refuse("allowed_token_ids", "at least one token id", given)
    return tuple(dict.fromkeys(_at_least("allowed_token_ids", token, 0) for token in given))


def _stop_ids(ids: object) -> tuple[int, ...]:
    """Each once; whether the model has them is for `Inputs` to say."""
    given = () if ids is None else listed_values("stop_token_ids", ids, "a sequence of token ids")
    if len(given) > MAX_STOP_TOKEN_IDS:
        refuse("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids", len(given))
    return tuple(dict.fromkeys(_at_least("stop_token_ids", token, 0) for token in given))
