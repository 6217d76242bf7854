"""How a weight is handed to a kernel: its parts, and four integers that say what they are.

layout [N, format, bits, group_size]       format: the number of `Format`; bits, group_size: of codes, else 0
"""

from __future__ import annotations

from torch import Tensor

from depthprune_runtime.weights.panels import PanelWeight
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec
from depthprune_runtime.weights.rows import RowsWeight, Stored, as_weight
from depthprune_runtime.weights.weight import Format, Weight

Packed = tuple[list[Tensor], list[int]]


def pack(stored: Stored) -> Packed:
    """The parts of a weight and their layout."""
    weight = as_weight(stored)
    return list(weight.parts().values()), [weight.out_features, int(weight.format), *weight.precision]


def unpack(tensors: list[Tensor], layout: list[int], in_features: int) -> Weight:
    """The weight [N, in_features] that `pack` took apart."""
    out_features, number, bits, group_size = layout
    match Format(number):
        case Format.ROWS:
            return RowsWeight(tensors[0])
        case Format.PANELS:
            return PanelWeight(tensors[0], out_features, in_features)
        case Format.CODES:
            spec = QuantSpec(bits, group_size, symmetric=len(tensors) == 2)
            return QuantizedWeight(spec, out_features, in_features, *tensors)
