"""Draws tokens from logits by inverting the distribution function. One program a request.

Three passes over the logits of a row, which lie in L2 when the head has just written them: the maximum, the sum, and
the first token whose cumulative weight passes the target. The contract is in depthprune_runtime/ops/draw_tokens.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.checks import expect
from depthprune_runtime.kernels.launch import capability_of
from depthprune_runtime.kernels.packed import DTYPES
from depthprune_runtime.kernels.pdl import follow, pdl_options


@triton.jit
def _weights(row_ptr, first, most, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] float64: exp((x - max) / temperature), 0 beyond V"""
    columns = first + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    return tl.exp((x - most) / temperature).to(tl.float64)


@triton.jit
def draw_tokens_kernel(
    logits_ptr,  # [B, V]
    temperatures_ptr,  # [B] float32
    uniform_ptr,  # [steps, B] float64
    counts_ptr,  # [B] int64
    drawn_ptr,  # [B] int64
    stride,
    num_steps,
    batch,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0:
        row_ptr = logits_ptr + row * stride
        largest = tl.full([BLOCK], -float("inf"), tl.float32)
        for first in range(0, V, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
            largest = tl.maximum(largest, x)
        most = tl.max(largest, axis=0)
        sums = tl.zeros([BLOCK], tl.float64)
        for first in range(0, V, BLOCK):
            sums += _weights(row_ptr, first, most, temperature, V, BLOCK)
        step = tl.minimum(tl.load(counts_ptr + row), num_steps - 1)
        target = tl.load(uniform_ptr + step * batch + row) * tl.sum(sums, axis=0)
        before = tl.sum(tl.zeros([BLOCK], tl.float64), axis=0)
        found = V - 1
        for first in range(0, V, BLOCK):
            weights = _weights(row_ptr, first, most, temperature, V, BLOCK)
            columns = first + tl.arange(0, BLOCK)
            passed = (before + tl.cumsum(weights, axis=0) > target) & (columns < V)
            found = tl.minimum(found, tl.min(tl.where(passed, columns, V - 1), axis=0))
            before += tl.sum(weights, axis=0)
        tl.store(drawn_ptr + row, found.to(tl.int64))
    else:
        tl.store(drawn_ptr + row, -1)


def draw_tokens(
    logits: Tensor,  # [B, V]
    temperatures: Tensor,  # [B] float32
    uniform: Tensor,  # [steps, B] float64
    counts: Tensor,  # [B] int64
) -> Tensor:  # [B] int64
    """Launcher of op `draw_tokens`."""
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.stride(1) != 1:
        raise ValueError(f"draw_tokens: expected logits of shape [B, V] with dense rows, got {list(logits.shape)}")
    batch, size = logits.shape
    if logits.dtype not in DTYPES:
        raise ValueError(f"draw_tokens: expected logits in bfloat16, float16 or float32, got {logits.dtype}")
    expect("draw_tokens", "temperatures", temperatures, (batch,), (torch.float32,), logits.device)
    expect("draw_tokens", "counts", counts, (batch,), (torch.int64,), logits.device)
    expect("draw_tokens", "uniform", uniform, ("steps", batch), (torch.float64,), logits.device)
    drawn = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch == 0:
        return drawn
    block = min(2048, triton.next_power_of_2(size))
    with torch.cuda.device_of(logits):
        draw_tokens_kernel[(batch,)](
            logits, temperatures, uniform, counts, drawn, logits.stride(0), uniform.shape[0], batch,
            V=size, BLOCK=block, num_warps=max(1, min(8, block // 256)), **pdl_options(capability_of(logits.device)),
        )  # fmt: skip
    return drawn
