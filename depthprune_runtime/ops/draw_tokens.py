"""Draws a token of every row of logits at its temperature, on the device: no filters, no penalties.

    token = min { t : sum_{s <= t} e_s > u sum_s e_s }        e_s = exp((x_s - max x) / temperature)

e in float32, sums in float64, u a uniform number of the request's own, one a step. The same rule as the sampler's, so
a request says the same wherever its tokens are drawn, up to the rounding of a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.ops._library import define


def _draw_tokens(logits: Tensor, temperatures: Tensor, uniform: Tensor, counts: Tensor) -> Tensor:
    drawn = temperatures > 0
    x = logits.float()
    weights = ((x - x.amax(-1, keepdim=True)) / torch.where(drawn, temperatures, 1.0)[:, None]).exp()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    steps = counts.clamp_max(uniform.shape[0] - 1)
    target = uniform.gather(0, steps[None])[0] * cumulative[:, -1]
    token = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_max(logits.shape[1] - 1)
    return torch.where(drawn, token, -1)


_draw_tokens_op = define(
    "draw_tokens(Tensor logits, Tensor temperatures, Tensor uniform, Tensor counts) -> Tensor", _draw_tokens
)


def draw_tokens(
    logits: Tensor,  # [B, V]
    temperatures: Tensor,  # [B] float32; 0: the row is greedy
    uniform: Tensor,  # [steps, B] float64 in [0, 1)
    counts: Tensor,  # [B] int64: which row of `uniform` is a request's next
) -> Tensor:  # [B] int64
    """Drawn tokens, -1 of greedy rows; of a row that is not finite, any."""
    out: Tensor = _draw_tokens_op(logits, temperatures, uniform, counts)
    return out
