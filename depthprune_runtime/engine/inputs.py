"""`Inputs`: prompts and sampling parameters as users give them, checked and turned into requests."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from depthprune_runtime.checkpoint.base import GENERATION_CONFIG_FILE
from depthprune_runtime.engine.params import ALL_LOGPROBS, MAX_OUTPUTS, SamplingParams
from depthprune_runtime.engine.prompts import Prompt, text_and_ids
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.stop_strings import StopStrings
from depthprune_runtime.engine.values import as_integer, integer, refuse, shown, token_ids, unicode_text
from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.text.tokenizer import Tokenizer

_DEFAULT_NEW_TOKENS = 128
_LONG_TOKENS = 8  # characters: texts of longer ones on average are rare
_MAX_ID_LENGTH = 256  # characters of a request's id
_log = logging.getLogger("depthprune_runtime")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused before anything is made of it.

    max_n: outputs per prompt; max_logprobs: alternatives reported with each token.
    """

    max_n: int = MAX_OUTPUTS
    max_logprobs: int = 2**31 - 1

    def check(self, params: SamplingParams) -> None:
        if params.n > self.max_n:
            raise InputError(f"n: expected at most {self.max_n} (max_n and max_waiting), got {params.n}")
        if (params.logprobs or 0) > self.max_logprobs:
            raise InputError(f"logprobs: expected at most {self.max_logprobs} (max_logprobs), got {params.logprobs}")


@dataclasses.dataclass
class RequestGroup:
    """A prompt and its outputs. prompt: None where only token ids were given."""

    request_id: str
    prompt: str | None
    prompt_ids: tuple[int, ...]
    requests: list[Request]
    num_unfinished: int


class Inputs:
    """What a model needs to know to take requests. Holds no state of any request: threads may share it.

    name: of the checkpoint, for messages; tokenizer: None if it carries none, or was to be left out (skipped);
    config: its generation config.
    """

    def __init__(
        self,
        name: str,
        spec: DecoderSpec,
        tokenizer: Tokenizer | None,
        config: Mapping[str, Any],
        skipped: bool = False,
    ) -> None:
        self.name = name
        self.spec = spec
        self.tokenizer = tokenizer
        self._missing = "it was loaded with skip_tokenizer_init" if skipped else "it carries no tokenizer"
        self.default_sampling_params = _default_params(name, config)
        self._eos_ids = self._ends(f"its {GENERATION_CONFIG_FILE}: eos_token_id", _stated_ends(config))
        if tokenizer is not None and (end := tokenizer.special_token_id("eos_token")) is not None:
            self._eos_ids |= self._ends("its tokenizer: eos_token", [end])

    def _ends(self, what: str, stated: Iterable[object]) -> frozenset[int]:
        """The ids of `stated` that the model has; one warning names the others. what: where they are stated."""
        found, wrong = set(), []
        for value in stated:
            token = as_integer(value)
            if token is not None and 0 <= token < self.spec.vocab_size:
                found.add(token)
            else:
                wrong.append(value)
        if wrong:
            _log.warning(
                "%s: %s: expected ids below %d, got %s; outputs do not end at them",
                self.name,
                what,
                self.spec.vocab_size,
                shown(wrong),
            )
        return frozenset(found)

    def require_tokenizer(self, otherwise: str = "text cannot be used; give token ids") -> Tokenizer:
        """The tokenizer; otherwise: what is impossible without it, for the message."""
        if self.tokenizer is None:
            raise InputError(f"{self.name}: {self._missing}, so {otherwise}")
        return self.tokenizer

    def check_length(self, length: int, what: str, room: int, at_least: bool = False) -> None:
        most = self.spec.max_position_embeddings - room
        if length > most:
            raise InputError(
                f"{what}: expected at most {most} tokens (the model's context is "
                f"{self.spec.max_position_embeddings}), got {'at least ' if at_least else ''}{length}; shorten it"
            )

    def encode(self, text: str, params: SamplingParams, what: str = "prompt") -> list[int]:
        """Token ids of `text`. What cannot fit is refused before it is tokenised, which takes long."""
        unicode_text(what, text)
        tokenizer = self.require_tokenizer()
        if len(text) > _LONG_TOKENS * self.spec.max_position_embeddings and (lengths := tokenizer.token_lengths):
            self.check_length(lengths.least(text), what, room=1, at_least=True)
        return tokenizer.encode(text, params.add_special_tokens, params.split_special_tokens)

    def prompt(self, prompt: Prompt, params: SamplingParams, what: str = "prompt") -> tuple[str | None, list[int]]:
        """Text of `prompt`, if known, and its token ids, with room for at least one more."""
        text, given = text_and_ids(prompt, what)
        ids = self.encode(text or "", params, what) if given is None else given
        ids = token_ids(what, ids, self.spec.vocab_size)
        if not ids:
            raise InputError(f"{what}: empty; expected at least one token")
        self.check_length(len(ids), what, room=1)
        return text, ids

    def id_rows(self, ids: Any) -> tuple[bool, list[list[int]]]:
        """Whether `ids` are nested, shape [B, S] rather than [S], and their rows: one, or B of equal lengths."""
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        nested = isinstance(values, list | tuple) and len(values) > 0 and isinstance(values[0], Sequence)
        if nested and not isinstance(values[0], str | bytes):
            rows = [token_ids(f"ids[{i}]", row, self.spec.vocab_size) for i, row in enumerate(values)]
        else:
            nested, rows = False, [token_ids("ids", values, self.spec.vocab_size)]
        if not rows[0] or len(set(map(len, rows))) > 1:
            refuse("ids", "shape [S] or [B, S], not empty", [len(row) for row in rows])
        return nested, rows

    def params(
        self,
        params: SamplingParams | None,
        options: Mapping[str, Any] | None = None,
        limits: Limits = Limits(),
    ) -> SamplingParams:
        """`params`, or the model's own, with `options` replaced; validated anew."""
        options = dict(options or {})
        if "max_new_tokens" in options:
            if "max_tokens" in options:
                raise InputError("max_new_tokens: another name of max_tokens; expected one of them, got both")
            options["max_tokens"] = options.pop("max_new_tokens")
        known = {f.name for f in dataclasses.fields(SamplingParams)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise InputError(f"unknown options {unknown}; known are {sorted(known)} and max_new_tokens")
        if params is not None and not isinstance(params, SamplingParams):
            raise InputError(f"sampling_params: expected SamplingParams, got {type(params).__name__}")
        chosen = dataclasses.replace(params or self.default_sampling_params, **options)
        if chosen.logprobs == ALL_LOGPROBS:
            chosen = dataclasses.replace(chosen, logprobs=self.spec.vocab_size)
        limits.check(chosen)
        for name, ids in chosen.named_ids.items():
            token_ids(name, ids, self.spec.vocab_size)
        if chosen.bad_words:
            self.require_tokenizer("bad_words cannot be seen; use logit_bias")
        if chosen.stop:
            self.require_tokenizer("stop strings cannot be seen; use stop_token_ids")
        return chosen

    def group(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str,
        priority: int = 0,
        what: str = "prompt",
        limits: Limits = Limits(),
    ) -> RequestGroup:
        """The outputs of one prompt, ready to be queued: what comes from outside is checked here, and nowhere later."""
        priority = integer("priority", priority, -(2**31), 2**31 - 1, ", lower is sooner")
        _check_request_id(request_id)
        params = self.params(params, limits=limits)
        text, ids = self.prompt(prompt, params, what)
        stream = None
        if self.tokenizer is not None and params.detokenize:
            spaces = params.spaces_between_special_tokens
            stream = self.tokenizer.stream(params.skip_special_tokens, ids, spaces)
        stops = StopStrings(params.stop_strings) if params.stop_strings else None
        stop_tokens = self._stop_tokens(params)
        bad_words = self._bad_words(params)
        requests = [
            Request(
                request_id,
                index,
                ids,
                params,
                self._eos_ids,
                self.spec.max_position_embeddings,
                None if stream is None else stream.fork(),
                priority,
                stops,
                stop_tokens,
                bad_words,
            )
            for index in range(params.n)
        ]
        return RequestGroup(request_id, text, tuple(ids), requests, params.n)

    def _stop_tokens(self, params: SamplingParams) -> dict[int, str]:
        """Id -> stop string, where that is a special token: left out of the text, it could not be found there."""
        if self.tokenizer is None or not params.stop_strings or not params.skip_special_tokens:
            return {}
        special = self.tokenizer.detokenizer.special
        return {i: text for i, text in special.items() if text in params.stop_strings}

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Token ids of each bad word, also behind a space where that makes another token of it, as in vLLM."""
        found: list[list[int]] = []
        for word in params.bad_words:
            tokenizer = self.require_tokenizer()
            bare = word.lstrip() or word
            plain = tokenizer.encode(bare, add_special_tokens=False)
            spaced = tokenizer.encode(f" {bare}", add_special_tokens=False)
            found += [plain] if plain else []
            if spaced and plain and spaced[0] != plain[0] and len(spaced) == len(plain):
                found.append(spaced)
        return found

    def token_text(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.detokenizer.token_text(token)


def _check_request_id(request_id: object) -> None:
    good = isinstance(request_id, str) and 0 < len(request_id) <= _MAX_ID_LENGTH and request_id.isprintable()
    if not good:
        refuse("request_id", f"a string of 1 to {_MAX_ID_LENGTH} printable characters", request_id)


def _stated_ends(config: Mapping[str, Any]) -> list[object]:
    """What `eos_token_id` lists, of whatever types; null alone says that there is none."""
    stated = config.get("eos_token_id")
    if stated is None:
        return []
    return list(stated) if isinstance(stated, list) else [stated]


def _default_params(name: str, config: Mapping[str, Any]) -> SamplingParams:
    """The model's generation config where it asks for sampling, else greedy; one warning names what it has wrong."""
    stated: dict[str, Any] = {}
    wrong = []
    for field in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if config.get(field) is not None:
            try:
                SamplingParams(**{field: config[field]})
                stated[field] = config[field]
            except InputError as error:
                wrong.append(str(error))
    samples = config.get("do_sample")
    samples = False if samples is None else samples
    if not isinstance(samples, bool):
        wrong.append(f"do_sample: expected true or false, got {shown(samples)}")
        samples = False
    if wrong:
        _log.warning("%s: its %s has values that are left out: %s", name, GENERATION_CONFIG_FILE, "; ".join(wrong))
    if not samples:
        stated = {"temperature": 0.0, "repetition_penalty": stated.get("repetition_penalty", 1.0)}
    return SamplingParams(max_tokens=_DEFAULT_NEW_TOKENS, **stated)
