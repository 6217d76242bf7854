"""`Samplers`: the sampling state of the running requests, and their next tokens; one that fails harms no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from depthprune_runtime.engine.adjustments import Adjustment, seen_tokens, token_bias
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.sampler import NONE_LEFT, NOT_FINITE, RequestSampler, next_tokens, top_logprobs
from depthprune_runtime.errors import printable

_DAMAGED = "model %s: logits are not finite: the weights are damaged, or overflow in this dtype; try dtype float32"
_NONE_LEFT = "no token is left: allowed_token_ids, bad_words and min_tokens remove them all; ask for less"

Likely = list[tuple[int, float, int]]  # (token, log-probability, rank)


class Choice(NamedTuple):
    """The next token of a request, and its likely alternatives if asked for; error: why there is none."""

    token: int
    likely: Likely | None = None
    error: str | None = None


class Samplers:
    """A sampler for each request from its first token to its end: those that wait have none. name: of the model."""

    def __init__(self, name: str, vocab_size: int, device: torch.device) -> None:
        self._name = name
        self._vocab_size = vocab_size
        self._device = device
        self._made: dict[int, RequestSampler] = {}  # by arrival
        # arrival of a prompt's first output; the prompt's tokens and the bias of its parameters
        self._shared: tuple[int, Tensor | None, Tensor | None] | None = None

    def of(self, request: Request) -> RequestSampler:
        sampler = self._made.get(request.arrival)
        if sampler is None:
            sampler = self._made[request.arrival] = self._make(request)
        return sampler

    def _make(self, request: Request) -> RequestSampler:
        params, size, device = request.params, self._vocab_size, self._device
        adjustment = None
        if params.adjusts:  # the outputs of a prompt stand in line together: what they share is made once
            first = request.arrival - request.output_index
            if self._shared is None or self._shared[0] != first:
                penalized = params.repetition_penalty != 1.0
                seen = seen_tokens(request.prompt_ids, size, device) if penalized else None
                self._shared = (first, seen, token_bias(params, size, device))
            _, seen, bias = self._shared
            own = None if seen is None else seen.clone()
            adjustment = Adjustment(params, own, bias, size, device, request.end_ids, request.bad_words)
        return RequestSampler(params, adjustment, request.output_index, size)

    def of_all(self, requests: Sequence[Request]) -> list[RequestSampler] | None:
        """The sampler of each request; None if one cannot be made. `choose` then names that request."""
        try:
            return [self.of(r) for r in requests]
        except Exception:
            return None

    def choice(self, token: int, likely: Likely | None = None) -> Choice:
        """`token`, or why there is none where it is negative."""
        if token >= 0:
            return Choice(token, likely)
        return Choice(NOT_FINITE, None, _NONE_LEFT if token == NONE_LEFT else _DAMAGED % printable(self._name, 1000))

    def drop(self, request: Request) -> None:
        """Forget a request that has ended."""
        self._made.pop(request.arrival, None)

    def choose(self, requests: Sequence[Request], logits: Tensor) -> list[Choice]:  # [B, V]
        """The next token of each request. If the batch fails, each is tried alone, with the same random numbers."""
        try:
            return self._choose(requests, logits)
        except Exception as error:
            if len(requests) == 1:
                reason = f"its next token cannot be chosen: {type(error).__name__}: {error}"
                return [Choice(NOT_FINITE, None, reason)]
        return [self.choose([request], logits[i : i + 1])[0] for i, request in enumerate(requests)]

    def _choose(self, requests: Sequence[Request], logits: Tensor) -> list[Choice]:
        samplers = [self.of(r) for r in requests]
        tokens = next_tokens(logits, samplers)
        found: dict[int, Likely] = {}
        rows = [i for i, r in enumerate(requests) if r.params.logprobs is not None and tokens[i] >= 0]
        if rows:
            counts = [requests[i].params.logprobs or 0 for i in rows]
            wanted = logits if len(rows) == len(requests) else logits[rows]
            found = dict(zip(rows, top_logprobs(wanted, [tokens[i] for i in rows], counts), strict=True))
        for sampler, token in zip(samplers, tokens, strict=True):
            sampler.take(token)
        return [self.choice(token, found.get(i)) for i, token in enumerate(tokens)]

    def check(self, unfinished: set[int]) -> None:
        """Assert that no sampler outlives its request, given the arrivals of those that run or wait. For tests."""
        assert set(self._made) <= unfinished
