"""The concatenated FFN's first half for CUDA devices: gate and up projection with the activation between, in one pass.

    out_tf = silu(sum_c x_tc g_fc (+ b_f)) * (sum_c x_tc u_fc (+ b_(F + f)))      g, u: the halves of weight [2F, C]

Sums and SiLU in float32, rounded once; the [T, 2F] between is never written. For the many tokens of a prefill.
Layout: rows of x and weight are contiguous; gate rows first, as the checkpoint stores them.
Grid: one program per tile of out, in groups of `group_rows` row tiles (see launch_gemm.py). It reads one tile of x and
the tiles of gate and up of the same columns, and keeps two accumulators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.dot import dot
from depthprune_runtime.kernels.launch import capability_of
from depthprune_runtime.kernels.launch_gemm import MIN_TOKENS, gated_linear_config

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _tile(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP_ROWS: tl.constexpr):
    """(row tile, column tile) of this program: down GROUP_ROWS rows, then the next column."""
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    column_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    group = program // (GROUP_ROWS * column_tiles)
    inside = program % (GROUP_ROWS * column_tiles)
    rows_of_group = tl.minimum(row_tiles - group * GROUP_ROWS, GROUP_ROWS)
    return group * GROUP_ROWS + inside % rows_of_group, inside // rows_of_group


@triton.jit
def gated_linear_kernel(
    x_ptr,  # [T, C]
    weight_ptr,  # [2F, C], gate rows first
    bias_ptr,  # [2F], or None
    out_ptr,  # [T, F]
    num_rows,
    channels,
    x_stride,
    weight_stride,
    out_stride,
    HIDDEN_SIZE: tl.constexpr,  # one a model, and the interpreter's loops take no run-time bound
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    EVEN_K: tl.constexpr = HIDDEN_SIZE % BLOCK_DEPTH == 0
    row_tile, column_tile = _tile(num_rows, channels, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS)
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    depth = tl.arange(0, BLOCK_DEPTH)
    # Beyond the edge the last row is read again: its results are not stored, and the loop needs no mask for it.
    # int64: T * C passes 2^31 in a long prefill, 2F * C in a large model.
    x_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    weight_rows = tl.minimum(columns, channels - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * x_stride + depth[None, :]  # [ROWS, DEPTH]
    gate_ptrs = weight_ptr + weight_rows[None, :] * weight_stride + depth[:, None]  # [DEPTH, COLUMNS]
    up_ptrs = weight_ptr + (weight_rows + channels)[None, :] * weight_stride + depth[:, None]
    gate = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    up = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, HIDDEN_SIZE, BLOCK_DEPTH):
        if EVEN_K:
            x = tl.load(x_ptrs)
            gate = dot(x, tl.load(gate_ptrs), gate)
            up = dot(x, tl.load(up_ptrs), up)
        else:
            inside = depth < HIDDEN_SIZE - start
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            gate = dot(x, tl.load(gate_ptrs, mask=inside[:, None], other=0.0), gate)
            up = dot(x, tl.load(up_ptrs, mask=inside[:, None], other=0.0), up)
        x_ptrs += BLOCK_DEPTH
        gate_ptrs += BLOCK_DEPTH
        up_ptrs += BLOCK_DEPTH
    if bias_ptr is not None:
        in_columns = columns < channels
        gate += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + channels + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    out = gate * tl.sigmoid(gate) * up
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < channels)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"gated_linear: expected x of dtype bfloat16, float16 or float32, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"gated_linear: expected x of shape [T, C], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] % 2:
        raise ValueError(f"gated_linear: expected weight of shape [2F, {x.shape[1]}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"gated_linear: expected bias of shape [{weight.shape[0]}], got {list(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"gated_linear: expected {name} {x.dtype} on {x.device} like x, got {t.dtype} {t.device}")


def takes(x: Tensor) -> bool:
    """Whether the launcher takes x [T, C]: few tokens, and float32, for which there are no tensor cores, are the work
    of the two ops that the reference is made of."""
    return x.dim() == 2 and x.shape[0] >= MIN_TOKENS and x.dtype != torch.float32


def gated_linear(
    x: Tensor,  # [T, C]
    weight: Tensor,  # [2F, C]
    bias: Tensor | None,  # [2F]
) -> Tensor:  # [T, F]
    """Launcher of op `gated_linear`, at any shape; the contract is in depthprune_runtime/ops/gated_linear.py."""
    _check(x, weight, bias)
    num_rows, hidden_size = x.shape
    channels = weight.shape[0] // 2
    out = torch.empty(num_rows, channels, dtype=x.dtype, device=x.device)
    if out.numel() == 0 or hidden_size == 0:
        return out.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    # what Triton specialises on: without it rows are loaded element by element
    aligned = all(t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, weight))
    config = gated_linear_config((num_rows, hidden_size, channels), aligned, capability_of(x.device))
    bias = bias.contiguous() if bias is not None else None
    grid = (triton.cdiv(num_rows, config.block_rows) * triton.cdiv(channels, config.block_columns),)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of the tensors
        gated_linear_kernel[grid](
            x,
            weight,
            bias,
            out,
            num_rows,
            channels,
            x.stride(0),
            weight.stride(0),
            out.stride(0),
            HIDDEN_SIZE=hidden_size,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLUMNS=config.block_columns,
            BLOCK_DEPTH=config.block_depth,
            GROUP_ROWS=config.group_rows,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
