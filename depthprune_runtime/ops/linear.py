"""Projection by a weight stored as [N, K].

    out_tn = sum_k x_tk w_nk (+ bias_n)

The C++ kernels (generic, AVX2, AVX-512, AVX-512 BF16, AMX; chosen at run time) sum in float32 in an order that depends
on K alone, and round once. Up to 64 tokens (4 without AVX2; float16 ones 256 at a time, any number of them unless
there is AMX) they read the weight once, as it is; more bfloat16 tokens are a blocked matrix product from AVX2 on.
Within either range a token's result is the same bits in any batch and on any number of threads. Whatever else comes,
and every other device, goes to torch's own linear, whose result for a token may depend on the batch. With AVX-512 BF16,
subnormal bfloat16 values count as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.ops._library import define


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


_linear_op = define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear)


def linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K], dtype of x
    bias: Tensor | None = None,  # [N], dtype of x
) -> Tensor:  # [T, N]
    """The projection of every row of `x`, in its dtype; on the CPU, ValueError for other shapes and mixed dtypes."""
    out: Tensor = _linear_op(x, weight, bias)
    return out
