"""Projection by a weight of 8 or 4 bits in the layout of `depthprune_runtime.weights.quantized`.

    out_tn = sum_k x_tk scale_ng (code_nk - zero_ng) (+ bias_n)        g: the group of k
    gated: silu_mul of it

The reference dequantises. The C++ kernels multiply integers: they round each run of 32 inputs to 8 bits by its own
scale, max |x| / 127 (as llama.cpp does), sum the products of a run exactly, and add the runs of a group, then the
groups, in float32 in order: a token's result is the same bits in any batch, on any number of threads, gated or not.

A weight that does not let its inputs be rounded (`rounds_inputs`) is dequantised strip by strip and multiplied in
float32, on any device: slower, most of all for a few tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.ops._library import define
from depthprune_runtime.ops.activation import silu_mul
from depthprune_runtime.ops.linear import linear
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

STRIP = 1 << 18  # weights that are dequantised at a time: their float32 stay in a core's second-level cache


def _quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    gated: bool,
) -> Tensor:
    spec = QuantSpec(bits, group_size, zeros is None)
    weight = QuantizedWeight(spec, out_features, x.shape[1], codes, scales, zeros)
    out = torch.nn.functional.linear(x, weight.dense(x.dtype), bias)
    return silu_mul(out) if gated else out


_quantized_linear_op = define(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int out_features, int bits, "
    "int group_size, bool gated) -> Tensor",
    _quantized_linear,
)


def quantized_linear(
    x: Tensor,  # [T, K]
    weight: QuantizedWeight,  # [N, K]; gated: [2F, K], gate rows first
    bias: Tensor | None = None,  # [N] or [2F], dtype of x
    gated: bool = False,
) -> Tensor:  # [T, N] or [T, F]
    """The projection of every row of `x`, in its dtype; ValueError for other shapes."""
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"quantized_linear: expected x of shape [T, {weight.in_features}], got {list(x.shape)}")
    if not weight.rounds_inputs:
        return _float_linear(x, weight, bias, gated)
    spec = weight.spec
    out: Tensor = _quantized_linear_op(
        x, weight.codes, weight.scales, weight.zeros, bias, weight.out_features, spec.bits, spec.group_size, gated
    )
    return out


def _float_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, gated: bool) -> Tensor:
    """The products of the inputs as they are, summed in float32 and rounded once."""
    wide = x.float()
    out = (wide if gated else x).new_empty(x.shape[0], weight.out_features)
    first = 0
    for strip in weight.strips(STRIP):
        last = first + strip.out_features
        part = None if bias is None else bias[first:last].float()
        out[:, first:last] = linear(wide, strip.dense(), part)
        first = last
    return silu_mul(out).to(x.dtype) if gated else out
