"""Matrix product of two tiles with float32 sums, also where Triton's interpreter runs the kernel.

The interpreter multiplies the bit patterns of bfloat16 without a warning, so there the tiles are widened first.
float32 tiles are multiplied in full precision, not in TF32.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc):
    """acc [M, N] float32 + a [M, K] @ b [K, N]"""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
