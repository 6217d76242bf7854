"""Choosing tokens from logits, each request by its own parameters and random stream, a batch at a time.

The logits are first adjusted (`engine.adjustments`). Then the order (temperature, top-k, top-p, min-p) and the tie
rules follow Transformers' logits processors. A token is drawn by inverting the distribution function at one uniform
number,

    token = min { t : sum_{s <= t} p_s > u * sum_s p_s },    u = next number of the request's own generator

so a request's draws depend on its seed alone, not on what else is in the batch, and a batch needs one pass.
A row whose logits, or what the parameters make of them, are not finite brings NOT_FINITE.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.engine.adjustments import REMOVED, Adjustment, adjusted, column, where
from depthprune_runtime.engine.params import SamplingParams

NOT_FINITE = -1  # in place of a token, where a row of logits is damaged; as `ops.greedy` says it
NONE_LEFT = -2  # in place of a token, where the request's own parameters remove them all
_CANDIDATES = 1024  # most likely tokens among which top-p looks first
_SAFE_MASS = 0.99  # beyond it, one minus a sum in float32 is too coarse
_DRAW_BITS = 48  # u < 1 - 2**-48, so u * total < total in float64


def _top_k(logits: Tensor, values: Sequence[float]) -> Tensor:
    best = torch.topk(logits, int(max(values))).values
    threshold = best.gather(1, column([k - 1 for k in values], logits, torch.int64))
    return logits.masked_fill(logits < threshold, REMOVED)


def _top_p(logits: Tensor, values: Sequence[float]) -> Tensor:
    if not logits.is_cuda and logits.shape[1] > _CANDIDATES and max(values) <= _SAFE_MASS:
        found = _top_p_of_candidates(logits, values)
        if found is not None:
            return found
    ordered, index = logits.sort(-1)
    tail = ordered.softmax(-1).cumsum(-1) <= column([1.0 - p for p in values], logits)
    tail[:, -1] = False  # the most likely token always stays
    return logits.masked_fill(tail.scatter(1, index, tail), REMOVED)


def _top_p_of_candidates(logits: Tensor, values: Sequence[float]) -> Tensor | None:
    """The same from the most likely tokens alone, None if a row needs more.

    A CPU sorts slowly: 16 rows of 49152 tokens take 48 ms on one core of an AMD EPYC, their 1024 best 7 ms.
    """
    ordered, index = logits.topk(_CANDIDATES)
    probabilities = (ordered - logits.logsumexp(-1, True)).exp()
    kept = probabilities.cumsum(-1) - probabilities < column(values, logits)
    kept[:, 0] = True
    if bool(kept[:, -1].any()):
        return None
    return torch.full_like(logits, REMOVED).scatter(1, index, ordered.masked_fill(~kept, REMOVED))


def _min_p(logits: Tensor, values: Sequence[float]) -> Tensor:
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < column(values, logits) * probabilities.amax(-1, True), REMOVED)


def filter_logits(
    logits: Tensor,  # [B, V] float32
    params: Sequence[SamplingParams],  # B of them, none greedy
) -> Tensor:  # [B, V], removed tokens -inf
    """Temperature, top-k, top-p and min-p, up to a constant; a filter costs only the rows that ask for it."""
    size = logits.shape[1]
    # the largest becomes 0: no temperature makes it overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / column([p.temperature for p in params], logits)
    steps = (
        (_top_k, [p.top_k for p in params], [0 < p.top_k < size for p in params]),
        (_top_p, [p.top_p for p in params], [p.top_p < 1.0 for p in params]),
        (_min_p, [p.min_p for p in params], [p.min_p > 0.0 for p in params]),
    )
    for apply, values, chosen in steps:
        wanted = [v for v, yes in zip(values, chosen, strict=True) if yes]
        logits = where(chosen, logits, partial(apply, values=wanted), logits)
    return logits


class RequestSampler:
    """Sampling state of one request: parameters, random stream, and what it changes in its logits.

    adjustment: None where the parameters ask for none; stream: which of its outputs.
    """

    def __init__(self, params: SamplingParams, adjustment: Adjustment | None, stream: int, vocab_size: int) -> None:
        self.params = params
        self.adjustment = adjustment
        self.plain_greedy = params.greedy and not params.adjusts
        filters = 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0
        self.plain = not params.adjusts and (params.greedy or not filters)  # `ops.draw_tokens` will do
        self._random: random.Random | None = None
        self._next: float | None = None
        if not params.greedy:
            # text is seeded through SHA-512, so neighbouring seeds and outputs share no streams
            self._random = random.Random() if params.seed is None else random.Random(f"{params.seed}/{stream}")

    def peek(self) -> float:
        """Next uniform number in [0, 1), which stays the next."""
        if self._next is None:
            assert self._random is not None
            self._next = self._random.getrandbits(_DRAW_BITS) / (1 << _DRAW_BITS)
        return self._next

    def draw(self) -> float:
        """Next uniform number in [0, 1)."""
        number, self._next = self.peek(), None
        return number

    def take(self, token: int) -> None:
        """Go on behind `token`, which `next_tokens` gave."""
        self._next = None
        if self.adjustment is not None and token >= 0:
            self.adjustment.take(token)


def _draw(logits: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:  # [B, V] float32 -> [B] int64
    filtered = filter_logits(logits, [s.params for s in samplers])
    cumulative = filtered.softmax(-1).cumsum(-1, dtype=torch.float64)
    uniform = column([s.peek() for s in samplers], logits, torch.float64)
    total = cumulative[:, -1:]
    found = torch.searchsorted(cumulative, uniform * total, right=True).clamp_max(logits.shape[1] - 1)
    return torch.where(total > 0, found, NOT_FINITE)[:, 0]  # NaN is not above 0


def _sample(
    logits: Tensor,  # [B, V] float32
    samplers: Sequence[RequestSampler],
    greedy: Tensor,  # [B] int64: the most likely tokens
) -> Tensor:  # [B] int64
    adjusts = any(s.adjustment is not None for s in samplers)
    if adjusts:
        logits = adjusted(logits, [s.adjustment for s in samplers])
        greedy = ops.greedy(logits)
    drawn = [not s.params.greedy for s in samplers]
    draw = partial(_draw, samplers=[s for s, yes in zip(samplers, drawn, strict=True) if yes])
    tokens = where(drawn, logits, draw, greedy)
    return torch.where(logits.amax(-1) == REMOVED, NONE_LEFT, tokens) if adjusts else tokens


def next_tokens(logits: Tensor, samplers: Sequence[RequestSampler]) -> list[int]:  # [B, V]
    """One token a request, or NOT_FINITE or NONE_LEFT; one host synchronisation. `take` makes it final."""
    greedy = ops.greedy(logits)
    tokens = greedy
    if not all(s.plain_greedy for s in samplers):
        tokens = torch.where(greedy < 0, NOT_FINITE, _sample(logits.float(), samplers, greedy))
    chosen: list[int] = tokens.tolist()
    return chosen


def sample_batch(logits: Tensor, samplers: Sequence[RequestSampler]) -> list[int]:  # [B, V]
    """`next_tokens`, taken."""
    chosen = next_tokens(logits, samplers)
    for sampler, token in zip(samplers, chosen, strict=True):
        sampler.take(token)
    return chosen


def top_logprobs(
    logits: Tensor,  # [B, V]
    tokens: Sequence[int],
    counts: Sequence[int],
) -> list[list[tuple[int, float, int]]]:
    """A row: (token, log-probability, rank) of its `counts[b]` most likely tokens and of `tokens[b]`."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, column(tokens, logits, torch.int64))
    ranks = ((logprobs > own).sum(-1) + 1).tolist()
    values, ids = (t.tolist() for t in torch.topk(logprobs, min(max(counts), logprobs.shape[1])))
    found = []
    for b, (token, count, value) in enumerate(zip(tokens, counts, own[:, 0].tolist(), strict=True)):
        row = [(int(ids[b][i]), float(values[b][i]), i + 1) for i in range(min(count, len(ids[b])))]
        if token not in ids[b][:count]:
            row.append((token, float(value), int(ranks[b])))
        found.append(row)
    return found
