"""`Linear`: a projection with its weight, dense (rows or panels) or quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.weights.panels import PanelWeight
from depthprune_runtime.weights.quantized import QuantizedWeight

Weight = Tensor | QuantizedWeight | PanelWeight


@dataclass(frozen=True)
class Linear:
    """`x W^T + b`."""

    weight: Weight  # [N, K]
    bias: Tensor | None = None  # [N]

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        if isinstance(self.weight, QuantizedWeight):
            return ops.quantized_linear(x, self.weight, self.bias)
        if isinstance(self.weight, PanelWeight):
            return ops.panel_linear(x, self.weight, self.bias)
        return ops.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:  # [N, K]
        """The weight as a plain tensor: a copy in float32 where it is quantised, a copy where it is in panels."""
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.dequantize()
        return self.weight.dense() if isinstance(self.weight, PanelWeight) else self.weight


def embedding(ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:  # [T] int64, [V, C] -> [T, C]
    """Rows `ids` of the embedding."""
    if isinstance(weight, QuantizedWeight):
        return weight.rows(ids, dtype)
    if isinstance(weight, PanelWeight):
        return weight.rows(ids)
    return torch.nn.functional.embedding(ids, weight)
