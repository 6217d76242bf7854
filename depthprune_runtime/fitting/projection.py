"""Repair: re-solve output projections in closed form, so that the student meets the teacher again.

    W = W0 + argmin_D  sum_t w_t |z_t (W0 + D)' - r_t|^2 + lam mean(diag G) |D|^2

z_t: inner activations of the student's sub-layer (heads' outputs, or psi); r_t: the teacher's hidden state at
the same point minus the student's residual stream before this sub-layer and the projection's bias; w_t: weight of the
token. Only G = sum w z'z and B = sum w z'r are needed, accumulated in one pass. No gradients.

Token weights `rms` are 1 / mean(target_t^2): the next norm divides by that size, so an error counts relative to
it. Without them a few tokens with massive activations decide the solution.

`strength` below 1 writes W0 + strength (W - W0), while the walk goes on with W: a model between the pruned and the
repaired one, meant to keep more of what the calibration text does not show, as models between the original and the
fine-tuned one do (Wortsman et al., arXiv 2109.01903).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting import linalg
from depthprune_runtime.fitting.finite import is_finite
from depthprune_runtime.fitting.options import Weighting
from depthprune_runtime.fitting.walk import Visit
from depthprune_runtime.host.devices import overflow_hint
from depthprune_runtime.spec import DecoderSpec, SublayerSpec


@dataclass
class Moments:
    """Weighted second moments of one sub-layer over all calibration tokens, divided by their number."""

    gram: Tensor  # [W, W] float32: z'z
    cross: Tensor  # [W, C] float32: z'r


def token_weights(target: Tensor, weighting: Weighting) -> Tensor | None:  # [T, C] -> [T, 1]
    if weighting == "none":
        return None
    return target.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).reciprocal()


def check_solvable(sublayer: SublayerSpec) -> None:
    """Refuse a sub-layer that ends in a norm: no size of what it adds can be chosen, and the norm is not linear."""
    if sublayer.post_norm:
        raise InputError(
            f"repair: expected sub-layers that end in a projection; the {sublayer.kind} of block {sublayer.origin[0]} "
            "ends in a norm, which least squares do not reach; use repair none"
        )


def check_all_solvable(spec: DecoderSpec) -> None:
    """`check_solvable` of every sub-layer, before any work."""
    for sublayer in spec.sublayers:
        check_solvable(sublayer)


def accumulate(visit: Visit, weighting: Weighting) -> Moments:
    """One pass over the tokens that enter `visit`'s sub-layer."""
    moments: Moments | None = None
    tokens = 0
    check_solvable(visit.sublayer.spec)
    bias = visit.sublayer.output_bias
    for b in range(len(visit.states)):
        states, target = visit.states.batch(b), visit.target.batch(b)
        inner = visit.inner(b)
        residual = target - states if bias is None else target - states - bias
        weights = token_weights(target, weighting)
        if moments is None:
            width, hidden = inner.shape[1], residual.shape[1]
            gram = linalg.zeros((width, width), torch.float32, inner.device)
            moments = Moments(gram, linalg.zeros((width, hidden), torch.float32, inner.device))
        linalg.accumulate_gram_(moments.gram, inner, weights)
        linalg.accumulate_(moments.cross, inner, residual, weights)
        tokens += inner.shape[0]
    assert moments is not None
    if not is_finite(moments.gram.diagonal()):
        spec, dtype = visit.sublayer.spec, visit.sublayer.dtype
        raise InputError(
            f"model: the inner activations of the {spec.kind} of block {spec.origin[0]} are not finite on the "
            f"calibration text; {overflow_hint(dtype)}"
        )
    linalg.mirror_(moments.gram)
    moments.gram /= tokens
    moments.cross /= tokens
    return moments


def solve(moments: Moments, initial: Tensor, columns: Tensor | None, lam: float) -> Tensor:  # [C, k] -> [C, k]
    """Repaired projection over the kept `columns` (None: all), ridge toward `initial`, float64."""
    system = linalg.gather_symmetric(moments.gram, columns)
    start = initial.double()
    right = linalg.multiply(system, start.T).neg_()
    right += moments.cross if columns is None else moments.cross[columns]
    linalg.add_ridge_(system, lam)
    return start + linalg.cholesky_solve_(linalg.cholesky_(system), right).T


def weakened(initial: Tensor, repaired: Tensor, strength: float | None) -> Tensor:  # [C, k] each
    """The weight that is written, in the dtype of `repaired`; strength: None writes the whole change."""
    return repaired if strength in (None, 1.0) else torch.lerp(initial.to(repaired.dtype), repaired, strength)
