"""RMSNorm fused into the projections behind it, for up to 64 tokens: plain, gated, and the head with its argmax.

    norm_linear         out_tn = rstd_t sum_k w_nk gain_k x_tk + b_n
    norm_gated_linear   out_tf = silu(g_tf) u_tf,  g and u the rows f and F + f of the same
    norm_logits         norm_linear, and of each run of 16 rows the largest and its row

Layout and inner loop: `rows`. Grid: one program per BLOCK_N rows (per BLOCK_N / 2 gated channels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.few_tokens import configure, halves, products, weight_arguments
from depthprune_runtime.kernels.launch import capability_of
from depthprune_runtime.kernels.launch_few_tokens import MAX_TOKENS, RUN
from depthprune_runtime.kernels.packed import check_norm, check_packed, few


@triton.jit
def norm_linear_kernel(
    x_ptr,  # [T, K]
    gain_ptr,  # [K]
    weight_ptr,  # [N, K], or words [P, tiles, 16]
    scales_ptr,  # [P, G, 16]
    zeros_ptr,  # [P, G, 16]
    bias_ptr,  # [N]
    out_ptr,  # [T, N]
    best_ptr,  # [T, R] float32
    best_row_ptr,  # [T, R] int32
    num_tokens,
    num_rows,
    K: tl.constexpr,
    x_stride,
    eps,
    HAS_BIAS: tl.constexpr,
    RUNS: tl.constexpr,  # 16-row runs of a program's tile whose maximum is wanted; 0: of none
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
        x_ptr, x_stride, gain_ptr, weight_ptr, scales_ptr, zeros_ptr, rows, rows_in, num_tokens, K, eps,
        True, QUANTIZED, BITS, GROUP, HAS_ZEROS, WHOLE_PANELS, BLOCK_T, BLOCK_N, BLOCK_K, EVEN_K, USE_DOT, STAGES, PDL,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows_in, other=0.0).to(tl.float32)[:, None]
    tokens = tl.arange(0, BLOCK_T)
    out = acc.to(out_ptr.dtype.element_ty)
    mask = rows_in[:, None] & (tokens < num_tokens)[None, :]
    tl.store(out_ptr + tokens.to(tl.int64)[None, :] * num_rows + rows[:, None], out, mask=mask)
    if RUNS > 0:
        # what is compared is what was stored, so the token agrees with the logits; NaN counts as +inf
        wide = out.to(tl.float32)
        wide = tl.where(wide <= float("inf"), wide, float("inf"))
        wide = tl.reshape(tl.where(rows_in[:, None], wide, -float("inf")), [RUNS, BLOCK_N // RUNS, BLOCK_T])
        best, place = tl.max(wide, axis=1, return_indices=True)  # [RUNS, BLOCK_T], the first of equals
        run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
        runs = tl.cdiv(num_rows, BLOCK_N // RUNS)
        where = tokens[None, :] * runs + run[:, None]
        run_in = (run < runs)[:, None] & (tokens < num_tokens)[None, :]
        tl.store(best_ptr + where, best, mask=run_in)
        tl.store(best_row_ptr + where, place + run[:, None] * (BLOCK_N // RUNS), mask=run_in)


@triton.jit
def norm_gated_linear_kernel(
    x_ptr,  # [T, K]
    gain_ptr,  # [K]
    weight_ptr,  # [2F, K], or words [P, tiles, 16]
    scales_ptr,  # [P, G, 16]
    zeros_ptr,  # [P, G, 16]
    bias_ptr,  # [2F]
    out_ptr,  # [T, F]
    num_tokens,
    channels,
    K: tl.constexpr,
    x_stride,
    eps,
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
    HALF: tl.constexpr = BLOCK_N // 2
    slot = tl.arange(0, BLOCK_N)
    channel = tl.program_id(0) * HALF + slot % HALF
    rows = channel + (slot // HALF) * channels
    rows_in = channel < channels
    acc = products(
        x_ptr, x_stride, gain_ptr, weight_ptr, scales_ptr, zeros_ptr, rows, rows_in, num_tokens, K, eps,
        True, QUANTIZED, BITS, GROUP, HAS_ZEROS, WHOLE_PANELS, BLOCK_T, BLOCK_N, BLOCK_K, EVEN_K, USE_DOT, STAGES, PDL,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows_in, other=0.0).to(tl.float32)[:, None]
    gate, up = halves(acc, BLOCK_T, BLOCK_N)  # [HALF, BLOCK_T]
    out = gate / (1.0 + tl.exp(-gate)) * up
    tokens = tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) * HALF + tl.arange(0, HALF)
    mask = (columns < channels)[:, None] & (tokens < num_tokens)[None, :]
    tl.store(out_ptr + tokens[None, :] * channels + columns[:, None], out.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_linear(
    x: Tensor, norm: Tensor, eps: float, weight: list[Tensor], layout: list[int], bias: Tensor | None, runs: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    num_rows = layout[0]
    config, constants = configure(x, weight, layout, capability_of(x.device))
    out = x.new_empty(x.shape[0], num_rows)
    best = best_row = None
    if runs:
        shape = (x.shape[0], triton.cdiv(num_rows, RUN))
        best, best_row = x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)
    with torch.cuda.device_of(x):
        norm_linear_kernel[(triton.cdiv(num_rows, config.block_n),)](
            x, norm, *weight_arguments(weight, layout), bias, out, best, best_row,
            x.shape[0], num_rows, x.shape[1], x.stride(0), eps,
            HAS_BIAS=bias is not None, RUNS=config.block_n // RUN if runs else 0, **constants,
        )  # fmt: skip
    return out, best, best_row


def takes(x: Tensor) -> bool:
    """Whether the launcher takes x [T, K]; for other numbers of tokens the reference is the better one."""
    return few(x, MAX_TOKENS)


def norm_linear(
    x: Tensor,  # [T, K]
    norm: Tensor,  # [K]
    eps: float,
    weight: list[Tensor],
    layout: list[int],
    bias: Tensor | None,  # [N]
) -> Tensor:  # [T, N]
    """Launcher of op `norm_linear`; the contract is in depthprune_runtime/ops/norm_linear.py."""
    check_packed("norm_linear", x, weight, layout, bias)
    check_norm("norm_linear", x, norm)
    return _launch_linear(x, norm, eps, weight, layout, bias, runs=False)[0]


def norm_logits(
    x: Tensor,  # [T, K]
    norm: Tensor,  # [K]
    eps: float,
    weight: list[Tensor],
    layout: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # [T, V], [T, R], [T, R]
    """Launcher of op `norm_logits`; the contract is in depthprune_runtime/ops/norm_linear.py."""
    check_packed("norm_logits", x, weight, layout, None)
    check_norm("norm_logits", x, norm)
    out, best, best_row = _launch_linear(x, norm, eps, weight, layout, None, runs=True)
    assert best is not None and best_row is not None
    return out, best, best_row


def norm_gated_linear(
    x: Tensor,  # [T, K]
    norm: Tensor,  # [K]
    eps: float,
    weight: list[Tensor],
    layout: list[int],
    bias: Tensor | None,  # [2F]
) -> Tensor:  # [T, F]
    """Launcher of op `norm_gated_linear`; the contract is in depthprune_runtime/ops/norm_linear.py."""
    op = "norm_gated_linear"
    check_packed(op, x, weight, layout, bias)
    check_norm(op, x, norm)
    if layout[0] % 2:
        raise ValueError(f"{op}: expected a weight of an even number of rows, got {layout[0]}")
    channels = layout[0] // 2
    config, constants = configure(x, weight, layout, capability_of(x.device), apart=channels)
    out = x.new_empty(x.shape[0], channels)
    with torch.cuda.device_of(x):
        norm_gated_linear_kernel[(triton.cdiv(channels, config.block_n // 2),)](
            x, norm, *weight_arguments(weight, layout), bias, out,
            x.shape[0], channels, x.shape[1], x.stride(0), eps, HAS_BIAS=bias is not None, **constants,
        )  # fmt: skip
    return out
