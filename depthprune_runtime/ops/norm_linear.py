"""RMSNorm and the projections behind it, for the few tokens of a decode step: one launch each on a GPU.

    norm_linear         W y + b                       y = rms_norm(x)
    norm_gated_linear   silu(g) * u                   (g, u) = W y + b, gate rows first
    norm_logits         W y, and the largest of each run of rows: what is left of the argmax

The references are compositions of the ops of that name. Kernels keep y in float32, or round it to the dtype of x where
matrix units multiply it; the factor 1 / rms(x) is one number a token, so it can come after the dot product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.kernels.launch_few_tokens import RUN
from depthprune_runtime.ops._library import define
from depthprune_runtime.ops.activation import silu_mul
from depthprune_runtime.ops.norm import rms_norm
from depthprune_runtime.ops.projection import packed_projection
from depthprune_runtime.weights.packed import pack
from depthprune_runtime.weights.rows import Stored


def _norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: list[Tensor], layout: list[int], bias: Tensor | None
) -> Tensor:
    return packed_projection(rms_norm(x, norm, eps), weight, layout, bias)


def _norm_gated_linear(
    x: Tensor, norm: Tensor, eps: float, weight: list[Tensor], layout: list[int], bias: Tensor | None
) -> Tensor:
    return silu_mul(_norm_linear(x, norm, eps, weight, layout, bias))


def _norm_logits(
    x: Tensor, norm: Tensor, eps: float, weight: list[Tensor], layout: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _norm_linear(x, norm, eps, weight, layout, None)
    wide = torch.nan_to_num(logits.float(), nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    runs = -(-logits.shape[1] // RUN)
    filled = torch.nn.functional.pad(wide, (0, runs * RUN - wide.shape[1]), value=-torch.inf)
    best, place = filled.view(-1, runs, RUN).max(-1)
    first = torch.arange(runs, device=x.device) * RUN
    return logits, best.contiguous(), (place + first).clamp_max(logits.shape[1] - 1).to(torch.int32)


_ARGUMENTS = "Tensor x, Tensor norm, float eps, Tensor[] weight, int[] layout"
_norm_linear_op = define(f"norm_linear({_ARGUMENTS}, Tensor? bias) -> Tensor", _norm_linear)
_norm_gated_linear_op = define(f"norm_gated_linear({_ARGUMENTS}, Tensor? bias) -> Tensor", _norm_gated_linear)
_norm_logits_op = define(f"norm_logits({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _norm_logits)


def norm_linear(
    x: Tensor,  # [T, K]
    norm: Tensor,  # [K]
    eps: float,
    weight: Stored,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [T, N]
    """`linear(rms_norm(x))`."""
    out: Tensor = _norm_linear_op(x, norm, eps, *pack(weight), bias)
    return out


def norm_gated_linear(
    x: Tensor,  # [T, K]
    norm: Tensor,  # [K]
    eps: float,
    weight: Stored,  # [2F, K], gate rows first
    bias: Tensor | None = None,  # [2F]
) -> Tensor:  # [T, F]
    """The inner activations of the FFN from the residual stream: `silu_mul(linear(rms_norm(x)))`."""
    out: Tensor = _norm_gated_linear_op(x, norm, eps, *pack(weight), bias)
    return out


def norm_logits(
    x: Tensor,  # [T, K]
    norm: Tensor,  # [K]
    eps: float,
    weight: Stored,  # [V, K]
) -> tuple[Tensor, Tensor, Tensor]:  # [T, V], [T, R] float32, [T, R] int32
    """Logits, and of each run of 16 of them the largest and its token (the first of equals).

    R = ceil(V / 16); NaN counts as +inf, so that `next_tokens` finds a damaged row.
    """
    logits, best, tokens = _norm_logits_op(x, norm, eps, *pack(weight))
    return logits, best, tokens
