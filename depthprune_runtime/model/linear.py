"""`Linear`: a projection with its weight, in any format."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.spec import Activation
from depthprune_runtime.weights.weight import Weight


@dataclass(frozen=True)
class Linear:
    """`x W^T + b`."""

    weight: Weight  # [N, K]
    bias: Tensor | None = None  # [N]

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        return ops.projection(x, self.weight, self.bias)

    def gated(self, x: Tensor, activation: Activation = "silu") -> Tensor:  # [T, K] -> [T, N / 2]
        """Gated activation of the projection: rows [0, N / 2) are gates."""
        if activation == "silu":
            return ops.projection(x, self.weight, self.bias, gated=True)
        return ops.gelu_tanh_mul(ops.projection(x, self.weight, self.bias))
