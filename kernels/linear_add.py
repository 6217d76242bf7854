"""The projection that ends a sub-layer, added to the residual stream, for up to 64 tokens.

    residual_tn += sum_k w_nk x_tk + b_n        in float32, rounded once

Layout and inner loop: `rows`. Grid: one program per BLOCK_N rows; each owns its part of the residual stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.few_tokens import configure, products, weight_arguments
from depthprune_runtime.kernels.launch import capability_of
from depthprune_runtime.kernels.launch_few_tokens import MAX_TOKENS
from depthprune_runtime.kernels.packed import check_packed, few


@triton.jit
def linear_add_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K], or words [P, tiles, 16]
    scales_ptr,  # [P, G, 16]
    zeros_ptr,  # [P, G, 16]
    bias_ptr,  # [N]
    residual_ptr,  # [T, N], updated in place
    num_tokens,
    num_rows,
    K: tl.constexpr,
    x_stride,
    residual_stride,
    HAS_BIAS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    WHOLE_PANELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_in = rows < num_rows
    acc = products(
        x_ptr, x_stride, x_ptr, weight_ptr, scales_ptr, zeros_ptr, rows, rows_in, num_tokens, K, 0.0,
        False, QUANTIZED, BITS, GROUP, HAS_ZEROS, WHOLE_PANELS, BLOCK_T, BLOCK_N, BLOCK_K, EVEN_K, USE_DOT, STAGES, PDL,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows_in, other=0.0).to(tl.float32)[:, None]
    tokens = tl.arange(0, BLOCK_T)
    mask = rows_in[:, None] & (tokens < num_tokens)[None, :]
    places = residual_ptr + tokens[None, :] * residual_stride + rows[:, None]
    total = tl.load(places, mask=mask, other=0.0).to(tl.float32) + acc
    tl.store(places, total.to(residual_ptr.dtype.element_ty), mask=mask)


def takes(x: Tensor) -> bool:
    """Whether the launcher takes x [T, K]; for other numbers of tokens the reference is the better one."""
    return few(x, MAX_TOKENS)


def linear_add(
    x: Tensor,  # [T, K]
    residual: Tensor,  # [T, N], updated in place
    weight: list[Tensor],
    layout: list[int],
    bias: Tensor | None,  # [N]
) -> None:
    """Launcher of op `linear_add`; the contract is in depthprune_runtime/ops/linear_add.py."""
    check_packed("linear_add", x, weight, layout, bias)
    num_rows = layout[0]
    if residual.shape != (x.shape[0], num_rows) or residual.dtype != x.dtype or residual.stride(-1) != 1:
        raise ValueError(
            f"linear_add: expected residual of shape [{x.shape[0]}, {num_rows}] in {x.dtype} with dense rows, "
            f"got {list(residual.shape)} in {residual.dtype}"
        )
    config, constants = configure(x, weight, layout, capability_of(x.device))
    with torch.cuda.device_of(x):
        linear_add_kernel[(triton.cdiv(num_rows, config.block_n),)](
            x, *weight_arguments(weight, layout), bias, residual,
            x.shape[0], num_rows, x.shape[1], x.stride(0), residual.stride(0), HAS_BIAS=bias is not None, **constants,
        )  # fmt: skip
