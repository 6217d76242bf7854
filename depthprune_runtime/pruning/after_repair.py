"""Which blocks to drop if a repair follows: by what a linear map cannot bring back.

For every span of neighbouring blocks [b, b + n), the FFN before it could answer for the span's whole
contribution x_{b+n} - x_b through its output projection. What the best such map leaves is the span's error:

    e(b, n) = E_t w_t |x_{t,b+n} - x_{t,b} - psi_{t,b-1} D|^2,   w_t = 1 / |x_{t,b}|^2

with D ridge-fitted on one half of the windows and the error taken on the other half, both ways, so that a
span is not praised for what the fit remembers. Neighbours are much cheaper together than apart, so the
choice is not a ranking of blocks: dynamic programming finds the disjoint spans with the smallest sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from depthprune_runtime import ops
from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import SublayerLoader
from depthprune_runtime.progress import Advance
from depthprune_runtime.pruning.calibration import CalibrationSet, window_batches
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.shortgpt import block_pairs
from depthprune_runtime.pruning.states import TokenStates

_MAX_SPAN = 6  # blocks; longer spans are seldom cheap, and every length costs a regression a block

Errors = dict[tuple[int, int], float]  # (first block, number of blocks) -> error


@dataclass
class _Start:
    """What spans that begin at one block need: the states there, and the fit of the FFN before it."""

    states: TokenStates  # [N, S, C] entering the block
    inner: TokenStates | None  # [N, S, F] psi of the FFN before it; None at the first block
    factors: tuple[Tensor, Tensor] | None  # Cholesky of the regularised Gram matrix [F, F], a half each
    grams: tuple[Tensor, Tensor] | None  # Gram matrix [F, F], a half each


def _weights(states: Tensor) -> Tensor:  # [T, C] -> [T, 1]
    return states.pow(2).sum(-1, keepdim=True).clamp_min(1e-12).reciprocal()


def _halves(count: int) -> tuple[range, range]:
    middle = math.ceil(count / 2)
    return range(middle), range(middle, count)


def _gram(start_states: TokenStates, inner: TokenStates, batches: range) -> Tensor:  # [F, F] float64
    total: Tensor | None = None
    for b in batches:
        z = inner.batch(b).float()
        part = (z * _weights(start_states.batch(b))).T @ z
        total = part if total is None else total + part
    assert total is not None
    return total.double()


def _begin(states: TokenStates, inner: TokenStates | None, lam: float) -> _Start:
    if inner is None:
        return _Start(states, None, None, None)
    first, second = (_gram(states, inner, half) for half in _halves(len(states)))
    factors = []
    for gram in (first, second):
        system = gram.clone()
        system.diagonal().add_(lam * float(gram.diagonal().mean()) + 1e-30)
        factors.append(torch.linalg.cholesky(system))
    return _Start(states, inner, (factors[0], factors[1]), (first, second))


def _moments(start: _Start, end: TokenStates, batches: range) -> tuple[Tensor | None, float]:
    """psi' w r [F, C] and sum of w |r|^2 over `batches`, r = end - start."""
    cross: Tensor | None = None
    energy = 0.0
    for b in batches:
        states = start.states.batch(b)
        weights = _weights(states)
        change = end.batch(b) - states
        energy += float((weights * change.pow(2)).sum())
        if start.inner is not None:
            part = (start.inner.batch(b).float() * weights).T @ change
            cross = part if cross is None else cross + part
    return (None if cross is None else cross.double()), energy


def _span_error(start: _Start, end: TokenStates) -> float:
    """e(b, n): fitted on each half, measured on the other."""
    halves = _halves(len(start.states))
    moments = [_moments(start, end, half) for half in halves]
    tokens = start.states.values.shape[0] * start.states.values.shape[1]
    if start.factors is None or start.grams is None:
        return sum(energy for _, energy in moments) / tokens
    total = 0.0
    for fit, held in ((0, 1), (1, 0)):
        cross_fit, (cross_held, energy) = moments[fit][0], moments[held]
        assert cross_fit is not None and cross_held is not None
        solution = torch.cholesky_solve(cross_fit, start.factors[fit])
        explained = 2.0 * (solution * cross_held).sum() - (solution * (start.grams[held] @ solution)).sum()
        total += energy - float(explained)
    return total / tokens


def span_errors(
    checkpoint: Checkpoint,
    windows: Tensor,  # [N, S] int64
    device: torch.device,
    dtype: torch.dtype,
    max_span: int = _MAX_SPAN,
    lam: float = 0.1,
    advance: Advance = lambda: None,
) -> Errors:
    """Error of every span of at most `max_span` blocks, in one pass of the dense model. lam: relative ridge."""
    spec = checkpoint.spec
    pairs = block_pairs(spec)
    loader = SublayerLoader(spec, checkpoint.tensor, device, dtype)
    count, seq_len = windows.shape
    batch_tokens = min(4096, max(seq_len, count // 2 * seq_len))  # at least two batches: the halves

    def buffer(width: int, kind: torch.dtype) -> TokenStates:
        return TokenStates(count, seq_len, width, device, batch_tokens, kind)

    states = buffer(spec.hidden_size, torch.float32)
    table = loader.tensor("embed_tokens.weight")
    for n, window in enumerate(windows):
        states.values[n] = embedding(window.to(device), table).float()
    errors: Errors = {}
    starts: dict[int, _Start] = {0: _begin(states, None, lam)}
    for block, pair in enumerate(pairs):
        after = buffer(spec.hidden_size, torch.float32)
        after.copy_from(states)
        inner: TokenStates | None = None
        for i in pair:
            sublayer = loader.sublayer(i)
            for b in range(len(after)):
                flat = after.batch(b)
                hidden = ops.rms_norm(flat, sublayer.norm.float(), spec.rms_norm_eps).to(dtype)
                z = sublayer.inner(hidden, packed(window_batches(flat.shape[0], seq_len), device))
                if i == pair[1]:
                    inner = buffer(z.shape[1], dtype) if inner is None else inner
                    inner.batch(b).copy_(z)
                flat += sublayer.project(z).float()
        for first, start in starts.items():
            errors[first, block + 1 - first] = _span_error(start, after)
        starts.pop(block + 1 - max_span, None)
        starts[block + 1] = _begin(after, inner, lam)
        states = after
        advance()
    return errors


def plan_after_repair(
    checkpoint: Checkpoint,
    blocks: int,
    calibration: CalibrationSet,
    device: torch.device,
    protect_last: bool = True,
    parent_digest: str = "",
    advance: Advance = lambda: None,
) -> PrunePlan:
    """Drop the `blocks` blocks whose spans leave the least error. The plan keeps every span's error."""
    pairs = block_pairs(checkpoint.spec)
    removable = len(pairs) - int(protect_last)
    if not 0 <= blocks <= removable:
        raise InputError(f"blocks: expected 0 to {removable} of {len(pairs)}, got {blocks}")
    errors = span_errors(checkpoint, calibration.windows, device, checkpoint.dtype, advance=advance)
    if not all(math.isfinite(e) for e in errors.values()):
        raise InputError("model: its hidden states are not finite; its weights are damaged")
    spans = choose_spans(errors, len(pairs), blocks, protect_last)
    gone = sorted(b for first, n in spans for b in range(first, first + n))
    if len(gone) != blocks:
        raise InputError(f"blocks: {blocks} of {len(pairs)} cannot go in spans of at most {_MAX_SPAN}; ask for fewer")
    settings = {
        "blocks": blocks,
        "score": "after-repair",
        "protect_last": protect_last,
        "calibration": calibration.description,
        "spans": [list(s) for s in spans],
        "span_errors": [[first, n, error] for (first, n), error in sorted(errors.items())],
    }
    return PrunePlan("shortgpt", parent_digest, tuple(Drop(i) for b in gone for i in pairs[b]), settings)


def choose_spans(errors: Errors, blocks: int, drop: int, protect_last: bool) -> list[tuple[int, int]]:
    """Disjoint spans (first, length), a kept block between any two, of `drop` blocks in all with the least error."""
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
                if (first, n) not in errors:
                    continue
                before = best[first - 1][k - n] if first > 0 else ((0.0, []) if k == n else nothing)
                options.append((before[0] + errors[first, n], [*before[1], (first, n)]))
            row[k] = min(options, key=lambda o: o[0], default=nothing)
        best.append(row)
    return best[last][drop][1]
