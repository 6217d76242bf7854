"""The projection that ends a sub-layer, added to the residual stream: residual += W x + b."""

from __future__ import annotations

from torch import Tensor

from depthprune_runtime.ops._library import define
from depthprune_runtime.ops.projection import packed_projection
from depthprune_runtime.weights.packed import pack
from depthprune_runtime.weights.rows import Stored


def _linear_add(x: Tensor, residual: Tensor, weight: list[Tensor], layout: list[int], bias: Tensor | None) -> None:
    residual.add_(packed_projection(x, weight, layout, bias))


_linear_add_op = define(
    "linear_add(Tensor x, Tensor(a!) residual, Tensor[] weight, int[] layout, Tensor? bias) -> ()", _linear_add
)


def linear_add(
    x: Tensor,  # [T, K]
    residual: Tensor,  # [T, N], updated in place
    weight: Stored,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> None:
    """`residual += linear(x)`; kernels add in float32 and round once, the reference rounds the projection first."""
    _linear_add_op(x, residual, *pack(weight), bias)
