"""`Inputs`: prompts and sampling parameters as users give them, checked and turned into requests."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.stop_strings import StopStrings
from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int]
_DEFAULT_NEW_TOKENS = 128
_log = logging.getLogger("depthprune_runtime")


@dataclasses.dataclass
class RequestGroup:
    """A prompt and its outputs. prompt: None where token ids were given."""

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
        self._eos_ids = _eos_ids(config, tokenizer)

    def require_tokenizer(self, otherwise: str = "text cannot be used; give token ids") -> Tokenizer:
        """The tokenizer; otherwise: what is impossible without it, for the message."""
        if self.tokenizer is None:
            raise InputError(f"{self.name}: {self._missing}, so {otherwise}")
        return self.tokenizer

    def check_ids(self, ids: Sequence[int], what: str) -> None:
        if ids and min(ids) >= 0 and max(ids) < self.spec.vocab_size:
            return
        wrong = next((i for i in ids if not 0 <= i < self.spec.vocab_size), None)
        if wrong is not None:
            raise InputError(f"{what}: expected token ids below {self.spec.vocab_size}, got {wrong}")

    def check_length(self, length: int, what: str, room: int) -> None:
        most = self.spec.max_position_embeddings - room
        if length > most:
            raise InputError(
                f"{what}: expected at most {most} tokens (the model's context is "
                f"{self.spec.max_position_embeddings}), got {length}; shorten it"
            )

    def encode(self, prompt: Prompt, params: SamplingParams, what: str = "prompt") -> list[int]:
        """Token ids of `prompt`, with room for at least one more."""
        if isinstance(prompt, str):
            tokenizer = self.require_tokenizer()
            ids = tokenizer.encode(prompt, params.add_special_tokens, params.split_special_tokens)
        else:
            ids = list(prompt)
        if not ids:
            raise InputError(f"{what}: empty; expected at least one token")
        if not all(isinstance(t, int) for t in ids):
            raise InputError(f"{what}: expected a string or a sequence of token ids, got {type(prompt).__name__}")
        self.check_ids(ids, what)
        self.check_length(len(ids), what, room=1)
        return ids

    def params(self, params: SamplingParams | None, options: Mapping[str, Any] | None = None) -> SamplingParams:
        """`params`, or the model's own, with `options` replaced; validated anew."""
        options = dict(options or {})
        if "max_new_tokens" in options:
            options["max_tokens"] = options.pop("max_new_tokens")
        known = {f.name for f in dataclasses.fields(SamplingParams)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise InputError(f"unknown options {unknown}; known are {sorted(known)} and max_new_tokens")
        if params is not None and not isinstance(params, SamplingParams):
            raise InputError(f"sampling_params: expected SamplingParams, got {type(params).__name__}")
        chosen = dataclasses.replace(params or self.default_sampling_params, **options)
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
    ) -> RequestGroup:
        """The outputs of one prompt, ready to be queued."""
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InputError(f"priority: expected an integer, lower is sooner, got {priority!r}")
        if not isinstance(request_id, str):
            raise InputError(f"request_id: expected a string, got {request_id!r}")
        if not isinstance(prompt, str | Sequence):
            raise InputError(f"{what}: expected a string or a sequence of token ids, got {type(prompt).__name__}")
        params = self.params(params)
        ids = self.encode(prompt, params, what)
        text = None if self.tokenizer is None else self.tokenizer.stream(params.skip_special_tokens, ids)
        stops = StopStrings(params.stop_strings) if params.stop_strings else None
        stop_tokens = self._stop_tokens(params)
        requests = [
            Request(
                request_id,
                index,
                ids,
                params,
                self._eos_ids,
                self.spec.max_position_embeddings,
                None if text is None else text.fork(),
                priority,
                stops,
                stop_tokens,
            )
            for index in range(params.n)
        ]
        return RequestGroup(request_id, prompt if isinstance(prompt, str) else None, tuple(ids), requests, params.n)

    def _stop_tokens(self, params: SamplingParams) -> dict[int, str]:
        """Id -> stop string, where that is a special token: left out of the text, it could not be found there."""
        if self.tokenizer is None or not params.stop_strings or not params.skip_special_tokens:
            return {}
        special = self.tokenizer.detokenizer.special
        return {i: text for i, text in special.items() if text in params.stop_strings}

    def token_text(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.detokenizer.token_text(token)


def listed(prompts: Prompt | Sequence[Prompt]) -> list[tuple[str, Prompt]]:
    """(name for messages, prompt) of a single prompt or each of several."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, int) for p in prompts))
    found: list[Any] = [prompts] if single else list(prompts)
    if not found:
        raise InputError("prompts: expected at least one prompt, got none")
    return [("prompt" if len(found) == 1 else f"prompts[{i}]", p) for i, p in enumerate(found)]


def _eos_ids(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> frozenset[int]:
    stated = config.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [stated]
    if tokenizer is not None:
        ids = list(itertools.chain(ids, [tokenizer.special_token_id("eos_token")]))
    return frozenset(i for i in ids if isinstance(i, int) and not isinstance(i, bool))


def _default_params(name: str, config: Mapping[str, Any]) -> SamplingParams:
    """The model's generation config where it asks for sampling, else greedy; one warning names what it has wrong."""
    stated: dict[str, Any] = {}
    wrong = []
    for field in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if config.get(field) is not None:
            try:
                SamplingParams(**{field: config[field]})
                stated[field] = config[field]
            except (InputError, OverflowError) as error:
                wrong.append(str(error)[:100])
    samples = config.get("do_sample") or False
    if not isinstance(samples, bool):
        wrong.append(f"do_sample: expected true or false, got {str(samples)[:40]!r}")
        samples = False
    if wrong:
        _log.warning("%s: its generation config has values that are left out: %s", name, "; ".join(wrong))
    if not samples:
        stated = {"temperature": 0.0, "repetition_penalty": stated.get("repetition_penalty", 1.0)}
    return SamplingParams(max_tokens=_DEFAULT_NEW_TOKENS, **stated)
