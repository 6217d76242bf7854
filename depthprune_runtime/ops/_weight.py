"""How the fused ops take a weight, dense (rows or panels) or quantised.

A list of tensors, and three integers that say what they are.
"""

from __future__ import annotations

from torch import Tensor

from depthprune_runtime.ops.linear import linear
from depthprune_runtime.ops.panel_linear import panel_linear
from depthprune_runtime.ops.quantized_linear import quantized_linear
from depthprune_runtime.weights.panels import PanelWeight
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

Weight = Tensor | QuantizedWeight | PanelWeight
# [weight [N, K]], [panels] or [codes, scales(, zeros)] of `weights.quantized`; (N, bits, group_size), with
# bits 0: dense rows, PANEL_BITS: panels
Packed = tuple[list[Tensor], list[int]]
PANEL_BITS = 16


def pack(weight: Weight) -> Packed:
    if isinstance(weight, QuantizedWeight):
        tensors = [weight.codes, weight.scales] + ([] if weight.zeros is None else [weight.zeros])
        return tensors, [weight.out_features, weight.spec.bits, weight.spec.group_size]
    if isinstance(weight, PanelWeight):
        return [weight.panels], [weight.out_features, PANEL_BITS, 0]
    return [weight], [weight.shape[0], 0, 0]


def unpack(tensors: list[Tensor], layout: list[int], in_features: int) -> Weight:
    out_features, bits, group_size = layout
    if bits == 0:
        return tensors[0]
    if bits == PANEL_BITS:
        return PanelWeight(tensors[0], out_features, in_features)
    spec = QuantSpec(bits, group_size, symmetric=len(tensors) == 2)
    return QuantizedWeight(spec, out_features, in_features, *tensors)


def project(x: Tensor, tensors: list[Tensor], layout: list[int], bias: Tensor | None) -> Tensor:  # [T, K] -> [T, N]
    """The projection by a packed weight, through the ops of its kind."""
    weight = unpack(tensors, layout, x.shape[1])
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias)
    if isinstance(weight, PanelWeight):
        return panel_linear(x, weight, bias)
    return linear(x, weight, bias)
