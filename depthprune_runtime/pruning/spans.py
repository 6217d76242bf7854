"""Which blocks to drop if a repair follows: by what a linear map cannot bring back.

For every span of neighbouring blocks [b, b + n), the FFN before it could answer for the span's whole
contribution x_{b+n} - x_b through its output projection. What the best such map leaves is the span's error:

    e(b, n) = E_t w_t |x_{t,b+n} - x_{t,b} - psi_{t,b-1} D|^2,   w_t = 1 / |x_{t,b}|^2

with D ridge-fitted on one half of the windows and the error taken on the other half, both ways, so that a
span is not praised for what the fit remembers. Wide residual streams are looked at along _DIRECTIONS random
orthonormal directions, scaled up, which leaves the error's mean as it is (Johnson and Lindenstrauss) and the
regressions affordable. Neighbours are much cheaper together than apart, so the choice is not a ranking of
blocks: dynamic programming finds the disjoint spans with the smallest sum.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting import linalg
from depthprune_runtime.fitting import states as token_states
from depthprune_runtime.fitting.finite import FiniteStates
from depthprune_runtime.fitting.states import TokenStates
from depthprune_runtime.fitting.stream import Stream, embed
from depthprune_runtime.model.decoder import SublayerLoader
from depthprune_runtime.progress import Advance
from depthprune_runtime.pruning.amount import block_pairs
from depthprune_runtime.spec import FFNSpec

WINDOWS = (64, 256)  # samples, seq_len: 32,768 tokens chose the same spans of SmolLM2 as 16,384
MAX_SPAN = 6  # blocks; longer spans are seldom cheap, and every length costs a regression a block
_DIRECTIONS = 128  # of the residual stream that are looked at
_LAM = 0.1  # of the regressions, relative to the mean of the Gram diagonal

Errors = dict[tuple[int, int], float]  # (first block, number of blocks) -> error


@dataclass
class _Start:
    """What spans that begin at one block need: the states there, and the fit of the FFN before it."""

    states: TokenStates  # [N, S, C] entering the block
    inner: TokenStates | None  # [N, S, F] psi of the FFN before it; None at the first block
    grams: tuple[Tensor, ...] = ()  # Gram matrix [F, F] float32, a half each
    factors: tuple[Tensor, ...] = ()  # Cholesky of the regularised Gram matrix [F, F] float64, a half each


def _weights(states: Tensor) -> Tensor:  # [T, C] -> [T, 1]
    return states.pow(2).sum(-1, keepdim=True).clamp_min(1e-12).reciprocal()


def _halves(count: int) -> tuple[range, range]:
    middle = math.ceil(count / 2)
    return range(middle), range(middle, count)


def _gram(states: TokenStates, inner: TokenStates, batches: range) -> Tensor:  # [F, F] float32
    width = inner.values.shape[-1]
    total = linalg.zeros((width, width), torch.float32, inner.values.device)
    for b in batches:
        linalg.accumulate_gram_(total, inner.batch(b), _weights(states.batch(b)))
    return linalg.mirror_(total)


def _begin(states: TokenStates, inner: TokenStates | None, lam: float) -> _Start:
    if inner is None:
        return _Start(states, None)
    grams = tuple(_gram(states, inner, half) for half in _halves(len(states)))
    systems = [linalg.gather_symmetric(gram) for gram in grams]
    for system in systems:
        linalg.add_ridge_(system, lam)
    return _Start(states, inner, grams, tuple(linalg.cholesky_(system) for system in systems))


def _directions(hidden_size: int, device: torch.device) -> Tensor | None:  # [C, k] float32
    """Orthonormal directions times sqrt(C / k), always the same; None where all C are looked at."""
    if hidden_size <= _DIRECTIONS:
        return None
    drawn = torch.randn(hidden_size, _DIRECTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled: Tensor = torch.linalg.qr(drawn).Q * math.sqrt(hidden_size / _DIRECTIONS)
    return scaled.float().to(device)


def _moments(
    start: _Start,
    end: TokenStates,
    batches: range,
    directions: Tensor | None,  # [C, k]
) -> tuple[Tensor | None, float]:
    """psi' w r [F, k] and sum of w |r|^2 over `batches`, r = (end - start) along `directions` (None: all of it)."""
    cross: Tensor | None = None
    if start.inner is not None:
        shape = (start.inner.values.shape[-1], end.values.shape[-1] if directions is None else directions.shape[1])
        cross = linalg.zeros(shape, torch.float32, end.values.device)
    energy = 0.0
    for b in batches:
        states = start.states.batch(b)
        weights = _weights(states)
        change = end.batch(b) - states
        if directions is not None:
            change = change @ directions
        energy += float((weights * change.pow(2)).sum())
        if start.inner is not None and cross is not None:
            linalg.accumulate_(cross, start.inner.batch(b), change, weights)
    return cross, energy


def _span_error(start: _Start, end: TokenStates, directions: Tensor | None) -> float:
    """e(b, n): fitted on each half, measured on the other."""
    moments = [_moments(start, end, half, directions) for half in _halves(len(start.states))]
    tokens = start.states.values.shape[0] * start.states.values.shape[1]
    total = 0.0
    for fit, held in ((0, 1), (1, 0)):
        cross_fit, (cross_held, energy) = moments[fit][0], moments[held]
        total += energy
        if cross_fit is None or cross_held is None:
            continue
        right = linalg.empty_column_major(cross_fit.shape[0], cross_fit.shape[1], torch.float64, cross_fit.device)
        right.copy_(cross_fit)
        solution = linalg.cholesky_solve_(start.factors[fit], right)
        total -= 2.0 * linalg.inner_product(solution, cross_held)
        total += linalg.inner_product(solution, linalg.multiply(start.grams[held], solution))
    return total / tokens


class _Pass:
    """One pass of the dense model, block by block, that keeps what every block takes in and its FFN's psi."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Tensor, device: torch.device, dtype: torch.dtype, kept: int
    ) -> None:
        self._spec = checkpoint.spec
        self._loader = SublayerLoader(self._spec, checkpoint.tensor, device, dtype)
        self._count, self._seq_len = windows.shape
        halves = max(self._seq_len, self._count // 2 * self._seq_len)  # at least two batches: the halves
        self._batch_tokens = min(token_states.batch_tokens(self._spec), halves)
        self._limit = token_states.MEMORY_LIMIT // (2 * kept)
        self.entering = self._buffer(self._spec.hidden_size, torch.float32)
        self.inner: TokenStates | None = None  # psi of the FFN last run
        self._stream = Stream(self._seq_len, device, FiniteStates(self._loader, checkpoint.name))
        embed(self._loader, windows, self.entering)

    def _buffer(self, width: int, dtype: torch.dtype) -> TokenStates:
        device = self._loader.device
        return TokenStates.empty(self._count, self._seq_len, width, device, self._batch_tokens, dtype, self._limit)

    def run(self, block: tuple[int, int]) -> None:
        """Go through one block; the states before it are left alone."""
        attention, ffn = block
        spec = self._spec.sublayers[ffn]
        assert isinstance(spec, FFNSpec)
        after = self._buffer(self._spec.hidden_size, torch.float32)
        self._stream.advance(attention, self._loader.sublayer(attention), self.entering, into=after)
        inner = self._buffer(spec.intermediate_size, self._loader.dtype)
        self._stream.advance(ffn, self._loader.sublayer(ffn), after, inner=inner)
        self.entering, self.inner = after, inner


def span_errors(
    checkpoint: Checkpoint,
    windows: Tensor,  # [N, S] int64
    device: torch.device,
    dtype: torch.dtype,
    max_span: int = MAX_SPAN,
    lam: float = _LAM,
    advance: Advance = lambda: None,
) -> Errors:
    """Error of every span of at most `max_span` blocks, in one pass of the dense model. lam: relative ridge.

    States and psi of max_span + 1 blocks are kept, so that only one block's Gram matrices and factors are needed
    at a time. advance: called once a block.
    """
    pairs = block_pairs(checkpoint.spec)
    dense = _Pass(checkpoint, windows, device, dtype, kept=max_span + 1)
    # states entering block first, first + 1, ..., each with psi of the FFN before it
    kept = collections.deque([(dense.entering, dense.inner)])
    errors: Errors = {}
    directions = _directions(checkpoint.spec.hidden_size, device)

    def finish(first: int) -> None:
        """All spans that begin at `first`, the oldest block kept."""
        begin, inner = kept.popleft()
        start = _begin(begin, inner, lam)
        for n, (end, _) in enumerate(kept, 1):
            errors[first, n] = _span_error(start, end, directions)
        advance()

    for block, pair in enumerate(pairs):
        dense.run(pair)
        kept.append((dense.entering, dense.inner))
        if len(kept) > max_span:
            finish(block + 1 - max_span)
    while len(kept) > 1:
        finish(len(pairs) + 1 - len(kept))
    return errors


def evidence(errors: Errors) -> dict[str, Any]:
    """What a choice of spans was made from, for the plan's settings; errors: of `span_errors` with its defaults."""
    return {
        "span_errors": [[first, n, error] for (first, n), error in sorted(errors.items())],
        "max_span": MAX_SPAN,
        "span_lam": _LAM,
        "directions": _DIRECTIONS,
    }


def equal_errors(blocks: int) -> Errors:
    """All spans there can be, with no error: tells what is possible before anything is measured."""
    return {(b, n): 0.0 for b in range(blocks) for n in range(1, min(MAX_SPAN, blocks - b) + 1)}


def dropped_blocks(errors: Errors, blocks: int, drop: int, protect_last: bool) -> list[int]:
    """The `drop` blocks whose spans leave the least error, in order; refuses numbers that cannot go."""
    removable = blocks - int(protect_last)
    if not 0 <= drop <= removable:
        raise InputError(f"blocks: expected 0 to {removable} of {blocks}, got {drop}")
    gone = sorted(b for f, n in choose_spans(errors, blocks, drop, protect_last) for b in range(f, f + n))
    if len(gone) != drop:
        raise InputError(
            f"blocks: {drop} of {blocks} cannot go in spans of at most {MAX_SPAN}; ask for fewer, or score "
            "block-influence"
        )
    return gone


def choose_spans(
    errors: Errors, blocks: int, drop: int, protect_last: bool, protect_first: bool = False
) -> list[tuple[int, int]]:
    """Disjoint spans (first, length), a kept block between any two, of `drop` blocks in all with the least error.

    Empty if there are none. protect_first: there is a kept block before every span.
    """
    last = blocks - 1 if protect_last else blocks
    # best[b][k]: least error with k of the first b blocks dropped and block b (if any) kept
    best: list[list[tuple[float, list[tuple[int, int]]]]] = []
    nothing: tuple[float, list[tuple[int, int]]] = (math.inf, [])
    for b in range(last + 1):
        row = [nothing] * (drop + 1)
        row[0] = (0.0, [])
        for k in range(1, drop + 1):
            options = [best[b - 1][k]] if b > 0 else []
            for n in range(1, min(k, b) + 1):
                first = b - n
                if (first, n) not in errors or (first == 0 and protect_first):
                    continue
                before = best[first - 1][k - n] if first > 0 else ((0.0, []) if k == n else nothing)
                options.append((before[0] + errors[first, n], [*before[1], (first, n)]))
            row[k] = min(options, key=lambda o: o[0], default=nothing)
        best.append(row)
    return best[last][drop][1]
