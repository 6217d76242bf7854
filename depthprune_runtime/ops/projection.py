"""`projection`: a projection by a weight of any format. The one table of formats and the ops that multiply by them.

out_tn = sum_k x_tk w_nk (+ bias_n), or gated  out_tf = silu(x_t . g_f (+ b_f)) * (x_t . u_f (+ b_(F + f)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from depthprune_runtime.ops.activation import silu_mul
from depthprune_runtime.ops.gated_linear import gated_linear
from depthprune_runtime.ops.linear import linear
from depthprune_runtime.ops.panel_linear import panel_linear
from depthprune_runtime.ops.quantized_linear import quantized_linear
from depthprune_runtime.weights.packed import unpack
from depthprune_runtime.weights.panels import PANEL_ROWS, PanelWeight
from depthprune_runtime.weights.rows import RowsWeight
from depthprune_runtime.weights.weight import Format, Weight


def _rows_linear(x: Tensor, weight: RowsWeight, bias: Tensor | None, gated: bool) -> Tensor:
    return gated_linear(x, weight.values, bias) if gated else linear(x, weight.values, bias)


def _panels_linear(x: Tensor, weight: PanelWeight, bias: Tensor | None, gated: bool) -> Tensor:
    if gated and weight.out_features % (2 * PANEL_ROWS) != 0:  # gate and up rows share a panel
        return silu_mul(panel_linear(x, weight, bias))
    return panel_linear(x, weight, bias, gated)


OPS: Mapping[Format, Callable[[Tensor, Any, Tensor | None, bool], Tensor]] = {
    Format.ROWS: _rows_linear,
    Format.PANELS: _panels_linear,
    Format.CODES: quantized_linear,
}


def projection(
    x: Tensor,  # [T, K]
    weight: Weight,  # [N, K]; gated: [2F, K], gate rows first
    bias: Tensor | None = None,  # [N] or [2F], dtype of x
    gated: bool = False,
) -> Tensor:  # [T, N] or [T, F]
    """The projection of every row of `x`, in its dtype."""
    return OPS[weight.format](x, weight, bias, gated)


def packed_projection(
    x: Tensor,  # [T, K]
    tensors: list[Tensor],
    layout: list[int],
    bias: Tensor | None,  # [N]
) -> Tensor:  # [T, N]
    """`projection` by a weight as `pack` hands it to kernels."""
    return projection(x, unpack(tensors, layout, x.shape[1]), bias)
