"""Stage 2 of FlattenGPT: which units a wide sub-layer keeps, from second moments of its inner activations.

Z are the inner activations of the wide student over T tokens, G = Z' Z / T. Everything follows from G:

- KV groups: f_g = sqrt(E_t |z_t,g * colnorm(W_O,g)|^2) = sqrt(sum over the group's columns c of G_cc |W_O[:, c]|^2).
- channels: ridge leverage s_i = [G (G + lam I)^-1]_ii = 1 - lam [(G + lam I)^-1]_ii. (The paper's
  printed `[C(C + lam I)]^-1_ii` is a typo: it ranks nearly backwards.)
- compensation of the output projection, ridge toward the kept columns:
  W = (S'GS + lam I)^-1 (S'G W_D + lam S'W_D), S = the kept units.

One lam serves scores and compensation: the paper's is 10 times the mean singular value of the whole G, which is
trace(G) / width. The options give the factor.

Source: arXiv 2602.08858; the reductions over groups are ours (methods that the paper leaves open).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from depthprune_runtime.fitting import linalg
from depthprune_runtime.plan import PrunePlan
from depthprune_runtime.pruning.amount import block_pairs
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, SublayerSpec


def kept_units(parent: DecoderSpec, plan: PrunePlan, keep_width: float) -> dict[int, int]:
    """Units that each merged sub-layer keeps, by its first source."""
    units = {}
    blocks = block_pairs(parent)
    for edit in plan.flattened():
        for index in blocks[edit.blocks[0]]:
            spec = parent.sublayers[index]
            own = spec.num_kv_heads if isinstance(spec, AttentionSpec) else spec.intermediate_size
            wide = own * len(edit.blocks)
            kept = own + round(keep_width * (wide - own))
            if not isinstance(spec, AttentionSpec) and own % 256 == 0:
                kept = min(wide, 256 * math.ceil(kept / 256))  # kernels and exports like whole tiles
            if kept < wide:
                units[index] = kept
    return units


def group_importance(gram: Tensor, weight: Tensor, spec: AttentionSpec) -> Tensor:  # [W, W], [C, W] -> [K]
    """Importance f_g of every KV group; W = H D columns of o_proj."""
    energy = gram.diagonal().double() * weight.double().pow(2).sum(0)
    return energy.view(spec.num_kv_heads, -1).sum(1).sqrt()


def leverage_scores(gram: Tensor, lam: float) -> Tensor:  # [F, F] -> [F] float64
    """Ridge leverage of every channel, between 0 and 1."""
    system = linalg.gather_symmetric(gram)
    absolute = linalg.add_ridge_(system, lam)
    return 1.0 - absolute * linalg.inverse_diagonal(linalg.cholesky_(system))


def top_units(scores: Tensor, count: int) -> tuple[int, ...]:  # [units]
    """Indices of the `count` largest scores, rising."""
    return tuple(sorted(torch.topk(scores, count).indices.tolist()))


def choose_units(gram: Tensor, weight: Tensor, spec: SublayerSpec, count: int, lam: float) -> tuple[int, ...]:
    """The `count` units that a wide sub-layer keeps."""
    if isinstance(spec, FFNSpec):
        return top_units(leverage_scores(gram, lam), count)
    return top_units(group_importance(gram, weight, spec), count)


def compensated(gram: Tensor, weight: Tensor, columns: Tensor, lam: float) -> Tensor:  # [F, F], [C, F], [k] -> [C, k]
    """Output projection over the kept `columns` that best replaces the whole one, float64.

    lam: ridge relative to the mean of the whole Gram diagonal, as that of the scores.
    """
    wide = weight.double()
    system = linalg.gather_symmetric(gram, columns)
    right = linalg.multiply(gram, wide.T, columns)  # S'G W_D
    absolute = linalg.ridge(gram, lam)
    system.diagonal().add_(absolute)
    right.add_(wide[:, columns].T, alpha=absolute)
    return linalg.cholesky_solve_(linalg.cholesky_(system), right).T
