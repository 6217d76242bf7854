"""The first half of the gated FFN: both projections and the activation between them.

    out_tf = silu(x_t . g_f (+ b_f)) * (x_t . u_f (+ b_(F + f)))      g, u: gate and up rows of one weight

The reference is `silu_mul` of `linear`, each with the kernels of its device; both round in between. A kernel of this
op's own (CUDA; the CPU for more than 64 bfloat16 tokens from AVX2 on) rounds once and never writes
the [T, 2F] between them. Which of the two runs may depend on the number of tokens, and with it a token's last bits.
"""

from __future__ import annotations

from torch import Tensor

from depthprune_runtime.ops._library import define
from depthprune_runtime.ops.activation import silu_mul
from depthprune_runtime.ops.linear import linear


def _gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return silu_mul(linear(x, weight, bias))


_gated_linear_op = define("gated_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _gated_linear)


def gated_linear(
    x: Tensor,  # [T, C]
    weight: Tensor,  # [2F, C], gate rows first, dtype of x
    bias: Tensor | None = None,  # [2F], dtype of x
) -> Tensor:  # [T, F]
    """The inner activations psi of the FFN, in the dtype of `x`."""
    out: Tensor = _gated_linear_op(x, weight, bias)
    return out
