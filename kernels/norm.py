"""RMSNorm, alone and fused with the residual add, for CUDA devices.

    out_tc = x_tc * rsqrt(mean_c(x_tc^2) + eps) * w_c        in float32, rounded once

Layout: the last dimension is contiguous; row t starts at (t // inner) * outer_stride + (t % inner) * inner_stride,
which covers [T, C] and the heads [T, H, D] of a wider projection. Any hidden size up to `launch.MAX_HIDDEN_SIZE`.
Grid: one program per `block_rows` rows; a program holds whole rows in registers, so x is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.launch import capability_of, launch_config

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _normalise(x, columns, in_columns, weight_ptr, hidden_size, eps):
    """float32 tile [BLOCK_ROWS, BLOCK_SIZE], zero beyond hidden_size -> normalised tile, float32."""
    # Independent of the statistics: issued before the reduction, its latency hides behind it.
    weight = tl.load(weight_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1) / hidden_size
    rstd = tl.rsqrt(mean + eps)
    return x * rstd[:, None] * weight[None, :]


@triton.jit
def _offsets(rows, columns, inner, outer_stride, inner_stride):
    starts = (rows // inner) * outer_stride + (rows % inner) * inner_stride
    return starts[:, None] + columns[None, :]


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [T, C]
    weight_ptr,  # [C]
    out_ptr,  # [T, C]
    num_rows,
    hidden_size,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    out_inner,
    out_outer_stride,
    out_inner_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # int64: num_rows * stride passes 2^31 in a long prefill
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_SIZE)
    in_columns = columns < hidden_size
    mask = (rows < num_rows)[:, None] & in_columns[None, :]
    x = tl.load(x_ptr + _offsets(rows, columns, x_inner, x_outer_stride, x_inner_stride), mask=mask, other=0.0)
    out = _normalise(x.to(tl.float32), columns, in_columns, weight_ptr, hidden_size, eps)
    out_offsets = _offsets(rows, columns, out_inner, out_outer_stride, out_inner_stride)
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,  # [T, C]
    residual_ptr,  # [T, C], updated in place
    weight_ptr,  # [C]
    out_ptr,  # [T, C]
    num_rows,
    hidden_size,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    out_inner,
    out_outer_stride,
    out_inner_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_SIZE)
    in_columns = columns < hidden_size
    mask = (rows < num_rows)[:, None] & in_columns[None, :]
    x = tl.load(x_ptr + _offsets(rows, columns, x_inner, x_outer_stride, x_inner_stride), mask=mask, other=0.0)
    residual_ptrs = residual_ptr + _offsets(rows, columns, residual_inner, residual_outer_stride, residual_inner_stride)
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    # The norm sees the sum as later sub-layers will: rounded to the dtype of the residual.
    total = (residual + x.to(tl.float32)).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptrs, total, mask=mask)
    out = _normalise(total.to(tl.float32), columns, in_columns, weight_ptr, hidden_size, eps)
    out_offsets = _offsets(rows, columns, out_inner, out_outer_stride, out_inner_stride)
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def _rows(t: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer_stride, inner_stride) of the rows of `t`; None where they do not fit that form."""
    if t.shape[-1] != 1 and t.stride(-1) != 1:
        return None
    merged: list[tuple[int, int]] = []  # (size, stride), innermost first
    for size, stride in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    if len(merged) == 2:
        return merged[0][0], merged[1][1], merged[0][1]
    return 1, merged[0][1] if merged else 0, 0


def _with_rows(t: Tensor) -> Tensor:
    return t if _rows(t) is not None else t.contiguous()


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"{op}: expected x of dtype bfloat16, float16 or float32, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{op}: expected x of at least one dimension, got a number")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: expected weight of shape [{x.shape[-1]}], got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"{op}: expected weight on {x.device} like x, got {weight.device}")


def _launch(
    op: str,
    x: Tensor,  # [..., C]
    residual: Tensor | None,  # [..., C], updated in place
    weight: Tensor,  # [C]
    eps: float,
) -> Tensor:  # [..., C], with the strides that the reference gives it
    out = torch.empty_like(x if residual is None else residual)
    if x.numel() == 0:
        return out
    hidden_size = x.shape[-1]
    num_rows = x.numel() // hidden_size
    config = launch_config(op, (num_rows, hidden_size), capability_of(x.device))
    x, weight = _with_rows(x), weight.contiguous()
    target = out if _rows(out) is not None else torch.empty_like(x, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(num_rows, config.block_rows),)
    blocks = {"BLOCK_ROWS": config.block_rows, "BLOCK_SIZE": config.block_size, "num_warps": config.num_warps}
    layout = (num_rows, hidden_size, *_rows(x))
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of the tensors
        if residual is None:
            rms_norm_kernel[grid](x, weight, target, *layout, *_rows(target), eps, **blocks)
        else:
            total = _with_rows(residual)
            layout += _rows(total)
            add_rms_norm_kernel[grid](x, total, weight, target, *layout, *_rows(target), eps, **blocks)
            if total is not residual:
                residual.copy_(total)
    return out if target is out else out.copy_(target)


def rms_norm(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    eps: float,
) -> Tensor:  # [..., C]
    """Launcher of op `rms_norm`; the contract is in depthprune_runtime/ops/norm.py."""
    _check("rms_norm", x, weight)
    return _launch("rms_norm", x, None, weight, eps)


def add_rms_norm(
    x: Tensor,  # [T, C]
    residual: Tensor,  # [T, C], updated in place
    weight: Tensor,  # [C]
    eps: float,
) -> Tensor:  # [T, C]
    """Launcher of op `add_rms_norm`; the contract is in depthprune_runtime/ops/norm.py."""
    _check("add_rms_norm", x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: expected residual like x {list(x.shape)} {x.dtype}, "
            f"got {list(residual.shape)} {residual.dtype}"
        )
    return _launch("add_rms_norm", x, residual, weight, eps)
