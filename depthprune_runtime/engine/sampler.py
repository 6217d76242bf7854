"""Choosing tokens from logits, each request by its own parameters and random stream.

The order (repetition penalty, temperature, top-k, top-p, min-p) and the tie rules follow Transformers'
logits processors. A request's draws depend on its seed alone, not on what else is in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.errors import InputError


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:  # [V], [N] int64 -> [V]
    """Divide positive and multiply negative logits of `seen` tokens by `penalty` (arXiv 1909.05858)."""
    chosen = logits[seen]
    return logits.index_copy(0, seen, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:  # [V] -> [V], removed tokens -inf
    """Temperature, top-k, top-p and min-p on float32 `logits`."""
    logits = logits / params.temperature
    removed = -float("inf")
    if 0 < params.top_k < logits.shape[0]:
        threshold = torch.topk(logits, params.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, removed)
    if params.top_p < 1.0:
        ordered, index = logits.sort()
        tail = ordered.softmax(-1).cumsum(-1) <= 1.0 - params.top_p
        tail[-1] = False  # the most likely token always stays
        logits = logits.masked_fill(tail.scatter(0, index, tail), removed)
    if params.min_p > 0.0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), removed)
    return logits


class RequestSampler:
    """Sampling state of one request: parameters, random stream, tokens seen."""

    def __init__(self, params: SamplingParams, prompt_ids: tuple[int, ...], stream: int, device: torch.device) -> None:
        self.params = params
        self._generator: torch.Generator | None = None
        self._seen: Tensor | None = None
        self._device = device
        if not params.greedy:
            self._generator = torch.Generator(device)
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed + stream)  # outputs of one request differ
        if params.repetition_penalty != 1.0:
            self._seen = torch.tensor(sorted(set(prompt_ids)), dtype=torch.int64, device=device)

    @property
    def plain_greedy(self) -> bool:
        """Whether argmax over the raw logits is all there is to do."""
        return self.params.greedy and self._seen is None

    def sample(self, logits: Tensor) -> int:  # [V] float32
        """Next token; raises InputError if the logits are not finite."""
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, self.params.repetition_penalty)
        if self.params.greedy:
            token = int(logits.argmax())
        else:
            probabilities = filter_logits(logits, self.params).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        if self._seen is not None and not bool((self._seen == token).any()):
            self._seen = torch.cat((self._seen, torch.tensor([token], device=self._device)))
        return token


def sample_batch(logits: Tensor, samplers: list[RequestSampler]) -> list[int]:  # [B, V]
    """One token a request."""
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise InputError("logits are not finite: the weights are damaged, or overflow in this dtype; try dtype float32")
    if all(s.plain_greedy for s in samplers):
        return [int(t) for t in logits.argmax(-1).tolist()]
    wide = logits.float()
    return [s.sample(row) for s, row in zip(samplers, wide, strict=True)]


def top_logprobs(logits: Tensor, token: int, count: int) -> list[tuple[int, float, int]]:  # [V]
    """(token, log-probability, rank) of the `count` most likely tokens and of `token`."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = torch.topk(logprobs, min(count, logprobs.shape[0])) if count else (logprobs[:0], torch.empty(0))
    found = [(int(i), float(v), rank) for rank, (i, v) in enumerate(zip(ids, values, strict=True), start=1)]
    if token not in [i for i, _, _ in found]:
        own = logprobs[token]
        found.append((token, float(own), int((logprobs > own).sum()) + 1))
    return found
