"""How the fused ops take a weight, dense (rows or panels) or quantised.

A list of tensors, and three integers that say what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.ops.linear import linear
from depthprune_runtime.ops.panel_linear import panel_linear
from depthprune_runtime.ops.quantized_linear import quantized_linear
from depthprune_runtime.panels import PanelWeight
from depthprune_runtime.quantized import QuantizedWeight, QuantSpec

Weight = Tensor | QuantizedWeight | PanelWeight
# [weight [N, K]], [panels] or [codes, scales(, zeros)] of `depthprune_runtime.quantized`; (N, bits, group_size), with
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


def check_packed(op: str, x: Tensor, tensors: list[Tensor], layout: list[int], bias: Tensor | None) -> None:
    """ValueError unless `x` [T, K] meets the packed weight [N, K] and `bias` [N]; for kernels of a GPU."""
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"{op}: expected x of shape [T, K] with dense rows, got {list(x.shape)}, {x.stride()}")
    out_features, bits, group_size = layout
    if bits == PANEL_BITS:
        raise ValueError(f"{op}: expected a weight in rows or quantised, got panels, which only CPU kernels read")
    if bits == 0:
        expected: dict[str, tuple[int, ...]] = {"weight": (out_features, x.shape[1])}
    else:
        expected = QuantSpec(bits, group_size, symmetric=len(tensors) == 2).shapes(out_features, x.shape[1])
    for (name, shape), tensor in zip(expected.items(), tensors, strict=True):
        if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != x.device:
            raise ValueError(
                f"{op}: expected {name} of shape {list(shape)}, contiguous, on {x.device}, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
    if bits == 0 and tensors[0].dtype != x.dtype:
        raise ValueError(f"{op}: expected weight of dtype {x.dtype} like x, got {tensors[0].dtype}")
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"{op}: expected bias of shape [{out_features}] in {x.dtype}, got {list(bias.shape)}")


def check_norm(op: str, x: Tensor, norm: Tensor) -> None:
    if tuple(norm.shape) != (x.shape[1],) or norm.device != x.device or norm.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: expected norm of shape [{x.shape[1]}] on {x.device}, got {list(norm.shape)}")
