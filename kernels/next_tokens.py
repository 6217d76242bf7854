"""The end of a decode step on the device: tokens, stops, and the state of the next step. One program a request.

The contract is in depthprune_runtime/ops/next_tokens.py. A row's program reads and writes only that row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.checks import INTEGERS, expect
from depthprune_runtime.kernels.launch import capability_of
from depthprune_runtime.kernels.launch_few_tokens import next_tokens_block
from depthprune_runtime.kernels.pdl import follow, pdl_options


@triton.jit
def next_tokens_kernel(
    best_ptr,  # [B, R] float32
    candidates_ptr,  # [B, R] int32
    drawn_ptr,  # [B] int64
    stop_ids_ptr,  # [B, I] int64
    block_tables_ptr,  # [B, M] int64
    ids_ptr,  # [B] int64
    positions_ptr,  # [B] int64
    slots_ptr,  # [B] int64
    context_lens_ptr,  # [B] int64
    counts_ptr,  # [B] int64
    tokens_ptr,  # [steps, B] int64
    num_stop_ids,
    num_blocks,
    kv_block_size,
    num_steps,
    batch,
    HAS_DRAWN: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_R)
    best = tl.full([BLOCK_R], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK_R], tl.int32)
    for first in range(0, NUM_RUNS, BLOCK_R):
        run = first + columns
        value = tl.load(best_ptr + row * NUM_RUNS + run, mask=run < NUM_RUNS, other=-float("inf"))
        better = value > best  # strictly: of equals in one lane the first stays
        best = tl.where(better, value, best)
        place = tl.where(better, run, place)
    largest = tl.max(best, axis=0)
    # of equals in different lanes the first run, whatever the order of the reduction
    run = tl.min(tl.where(best == largest, place, NUM_RUNS), axis=0)
    finite = (largest > -float("inf")) & (largest < float("inf"))
    chosen = tl.load(candidates_ptr + row * NUM_RUNS + run).to(tl.int64)
    if HAS_DRAWN:
        drawn = tl.load(drawn_ptr + row)
        chosen = tl.where(drawn >= 0, drawn, chosen)
    chosen = tl.where(finite, chosen, -1)

    count = tl.load(counts_ptr + row)
    inside = (tl.load(slots_ptr + row) >= 0) & (count < num_steps)
    tl.store(tokens_ptr + count * batch + row, chosen, mask=inside)
    tl.store(counts_ptr + row, count + 1, mask=inside)
    stop = tl.arange(0, BLOCK_I)
    ends = tl.load(stop_ids_ptr + row * num_stop_ids + stop, mask=stop < num_stop_ids, other=-1) == chosen
    stops = tl.sum(ends.to(tl.int32), axis=0) > 0
    going = inside & finite & (stops == 0)
    position = tl.load(positions_ptr + row) + going.to(tl.int64)
    block = tl.minimum(position // kv_block_size, num_blocks - 1)
    slot = tl.load(block_tables_ptr + row * num_blocks + block) * kv_block_size + position % kv_block_size
    tl.store(positions_ptr + row, position)
    tl.store(slots_ptr + row, tl.where(going, slot, -1))
    tl.store(context_lens_ptr + row, tl.where(going, position + 1, 1))
    tl.store(ids_ptr + row, chosen, mask=going)


def next_tokens(
    best: Tensor,  # [B, R] float32
    candidates: Tensor,  # [B, R] int32
    drawn: Tensor | None,  # [B] int64
    stop_ids: Tensor,  # [B, I] int64
    block_tables: Tensor,  # [B, M] int64
    kv_block_size: int,
    ids: Tensor,  # [B] int64
    positions: Tensor,  # [B] int64
    slots: Tensor,  # [B] int64
    context_lens: Tensor,  # [B] int64
    counts: Tensor,  # [B] int64
    tokens: Tensor,  # [steps, B] int64
) -> None:
    """Launcher of op `next_tokens`."""
    op, on = "next_tokens", best.device
    if best.dim() != 2 or tokens.dim() != 2 or stop_ids.dim() != 2:
        shapes = [list(t.shape) for t in (best, tokens, stop_ids)]
        raise ValueError(f"{op}: expected best [B, R], tokens [steps, B] and stop_ids [B, I], got {shapes}")
    batch, runs = best.shape
    if kv_block_size < 1:
        raise ValueError(f"{op}: expected kv_block_size of at least 1, got {kv_block_size}")
    expect(op, "best", best, (batch, "R"), (torch.float32,), on)
    expect(op, "candidates", candidates, (batch, runs), INTEGERS, on)
    expect(op, "stop_ids", stop_ids, (batch, stop_ids.shape[1]), (torch.int64,), on)
    expect(op, "block_tables", block_tables, (batch, "M"), (torch.int64,), on)
    expect(op, "tokens", tokens, (tokens.shape[0], batch), (torch.int64,), on)
    state = {"ids": ids, "positions": positions, "slots": slots, "context_lens": context_lens, "counts": counts}
    for name, tensor in (state if drawn is None else state | {"drawn": drawn}).items():
        expect(op, name, tensor, (batch,), (torch.int64,), on)
    if batch == 0:
        return
    block, warps = next_tokens_block(runs)
    stops = max(1, triton.next_power_of_2(stop_ids.shape[1]))
    pdl = pdl_options(capability_of(best.device))
    with torch.cuda.device_of(best):
        next_tokens_kernel[(batch,)](
            best, candidates, drawn, stop_ids, block_tables, ids, positions, slots, context_lens, counts, tokens,
            stop_ids.shape[1], block_tables.shape[1], kv_block_size, tokens.shape[0], batch,
            HAS_DRAWN=drawn is not None, NUM_RUNS=runs, BLOCK_R=block, BLOCK_I=stops, num_warps=warps, **pdl,
        )  # fmt: skip
