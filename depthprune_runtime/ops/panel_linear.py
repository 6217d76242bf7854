"""Projection by a bfloat16 weight in the panels of `depthprune_runtime.weights.panels`, and packing of those.

    out_tn = sum_k x_tk w_nk (+ bias_n), or gated  out_tf = silu(x_t . g_f (+ b_f)) * (x_t . u_f (+ b_(F + f)))

The reference unpacks. The C++ kernels (AVX2, AVX-512, AVX-512 BF16, AMX; plain code elsewhere) sum in float32 in the
order of K (AVX-512: even and odd columns apart), and round once: a token's result is the same bits in any batch, on any
number of threads. With AMX, its matrix unit takes more than 64 tokens, and rounds its sums in its own way. From
AVX-512 BF16 on, subnormal values count as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.ops._library import define
from depthprune_runtime.ops.activation import silu_mul
from depthprune_runtime.weights.panels import PanelWeight, from_panels, to_panels


def _panel_linear(x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int, gated: bool) -> Tensor:
    out = torch.nn.functional.linear(x, from_panels(panels, out_features, x.shape[1]), bias)
    return silu_mul(out) if gated else out


_panel_linear_op = define(
    "panel_linear(Tensor x, Tensor panels, Tensor? bias, int out_features, bool gated) -> Tensor", _panel_linear
)


def panel_linear(
    x: Tensor,  # [T, K] bfloat16
    weight: PanelWeight,  # [N, K]; gated: [2F, K], gate rows first, 2F a multiple of 32
    bias: Tensor | None = None,  # [N] or [2F]
    gated: bool = False,
) -> Tensor:  # [T, N] or [T, F]
    """The projection of every row of `x`; ValueError for other shapes."""
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"panel_linear: expected x of shape [T, {weight.in_features}], got {list(x.shape)}")
    out: Tensor = _panel_linear_op(x, weight.panels, bias, weight.out_features, gated)
    return out


def _pack_panels(weight: Tensor, panels: Tensor) -> None:
    panels.copy_(to_panels(weight))


_pack_panels_op = define("pack_panels(Tensor weight, Tensor(a!) panels) -> ()", _pack_panels)


def pack_panels(
    weight: Tensor,  # [N, K] bfloat16
    panels: Tensor,  # of `panel_shape(N, K)`, written
) -> PanelWeight:
    """`weight` packed into `panels`."""
    _pack_panels_op(weight, panels)
    return PanelWeight(panels, *weight.shape)
