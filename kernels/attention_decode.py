"""Split-KV decode over the paged cache: one query a request, for CUDA devices.

    out_h = sum_s p_hs v_s / l_h    p_hs = 2^(c q_h . k_s - m_h), l_h = sum_s p_hs, c = scale * log2(e)

over keys max(0, L - window) <= s < L of a request of L tokens; L <= 0 gives zeros and reads no cache.
Layout: head_dim is contiguous everywhere, the other strides are free. The H / K query heads of a KV group are the rows
of one tile, so each key is read once; a group of one head multiplies without tensor cores.
Grid: (B * K, splits). The tiles of BLOCK_N keys are dealt evenly to the splits by the request's own L, read on the
device, so a captured launch serves every length; what is left over exits at once.
Combining: each split leaves (m, l, o) in float32, and the last to arrive, by a ticket, adds all of them in the order of
the splits. The ticket decides who adds, never in what order: two runs are bit-equal. A request's result depends on the
others of its batch only through the number of splits, a static function of B * K and the width of the block tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.dot import dot
from depthprune_runtime.kernels.key_rows import paged_rows
from depthprune_runtime.kernels.launch import capability_of, next_power_of_2, sm_count_of
from depthprune_runtime.kernels.launch_attention import MAX_TICKETS, decode_config
from depthprune_runtime.kernels.pdl import follow, pdl_options


@triton.jit
def _powers(scores, m):
    """exp2(scores - m), 0 where a score is -inf, also while m is."""
    return tl.exp2(scores - tl.where(m == float("-inf"), 0.0, m))


@triton.jit
def _load_tile(
    start, first, length, table_ptr, k_ptr, v_ptr, dims, in_dim,
    k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, BLOCK_N: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """visible [BLOCK_N], K and V [BLOCK_N, BLOCK_D] of the tokens from `start`."""
    positions = start + tl.arange(0, BLOCK_N)
    visible = (positions >= first) & (positions < length)
    mask = visible[:, None] & in_dim[None, :]
    # Each key is read once a step, and the weights of the whole model pass before the next: L2 is for the rest.
    k_rows = paged_rows(positions, visible, table_ptr, KV_BLOCK, k_block_stride, k_slot_stride)
    k = tl.load(k_ptr + k_rows[:, None] + dims[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    v_rows = paged_rows(positions, visible, table_ptr, KV_BLOCK, v_block_stride, v_slot_stride)
    v = tl.load(v_ptr + v_rows[:, None] + dims[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    return visible, k, v


@triton.jit
def _attend_head(
    q_ptr, begin, end, first, length, scale, table_ptr, k_ptr, v_ptr, dims, in_dim,
    k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, KV_BLOCK: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One head. Each slot of the tile keeps a softmax of its own: no warp waits for another."""
    # Loaded by the tile's first row and summed over rows, q [1, BLOCK_D] comes to lie as K does. Loaded as a row it
    # would spread over all warps, Triton would make K follow it, and each tile would be summed across warps.
    in_tile = (tl.arange(0, BLOCK_N) == 0)[:, None] & in_dim[None, :]
    q_tile = tl.load(q_ptr + tl.zeros([BLOCK_N, 1], tl.int32) + dims[None, :], mask=in_tile, other=0.0)
    q = tl.sum(q_tile.to(tl.float32), axis=0)[None, :] * scale
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # An explicit num_stages: loads that feed no tl.dot are pipelined only where it is asked for.
    for start in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        visible, k, v = _load_tile(
            start, first, length, table_ptr, k_ptr, v_ptr, dims, in_dim,
            k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, BLOCK_N, KV_BLOCK,
        )  # fmt: skip
        scores = tl.where(visible, tl.sum(k.to(tl.float32) * q, axis=1), float("-inf"))
        m_new = tl.maximum(m, scores)
        p = _powers(scores, m_new)
        alpha = _powers(m, m_new)
        total = total * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v.to(tl.float32)
        m = m_new
    top = tl.max(m, axis=0)
    weights = _powers(m, top)
    total_row = tl.sum(total * weights, axis=0)
    acc_row = tl.sum(acc * weights[:, None], axis=0)
    return tl.full([1], 0.0, tl.float32) + top, tl.full([1], 0.0, tl.float32) + total_row, acc_row[None, :]


@triton.jit
def _attend_group(
    q, begin, end, first, length, scale, table_ptr, k_ptr, v_ptr, dims, in_dim,
    k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, KV_BLOCK: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """The heads of a KV group, q [BLOCK_M, BLOCK_D]; a tile has a key that all rows see, so m is finite after it."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        visible, k, v = _load_tile(
            start, first, length, table_ptr, k_ptr, v_ptr, dims, in_dim,
            k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, BLOCK_N, KV_BLOCK,
        )  # fmt: skip
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        p = tl.exp2(scores - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, axis=1)
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = m_new
    return m, total, acc


@triton.jit
def _store(out_ptr, head_stride, rows, dims, mask, total, acc):
    out = acc / tl.where(total > 0, total, 1.0)[:, None]  # no key: 0 / 1
    tl.store(out_ptr + rows[:, None] * head_stride + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine(
    partial_o_ptr,  # [splits, G, D] of this (request, KV group)
    partial_m_ptr,  # [splits, G]
    partial_l_ptr,  # [splits, G]
    out_ptr,  # [G, D]
    out_head_stride,
    used,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds the first `used` partial results in their order, CHUNK at a time, and writes the outputs.

    .cg: from L2, where the other programs' stores are; this SM's L1 cannot know of them.
    """
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    in_row, in_dim = rows < GROUP, dims < HEAD_DIM
    m = tl.full([ROWS], float("-inf"), tl.float32)
    for chunk in range(0, used, CHUNK):
        splits = chunk + tl.arange(0, CHUNK)
        mask = (splits < used)[:, None] & in_row[None, :]
        offsets = splits[:, None] * GROUP + rows[None, :]
        m_s = tl.load(partial_m_ptr + offsets, mask=mask, other=float("-inf"), cache_modifier=".cg")
        m = tl.maximum(m, tl.max(m_s, axis=0))
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for chunk in range(0, used, CHUNK):
        splits = chunk + tl.arange(0, CHUNK)
        mask = (splits < used)[:, None] & in_row[None, :]
        offsets = splits[:, None] * GROUP + rows[None, :]
        m_s = tl.load(partial_m_ptr + offsets, mask=mask, other=float("-inf"), cache_modifier=".cg")
        l_s = tl.load(partial_l_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        o_ptrs = partial_o_ptr + offsets[:, :, None] * HEAD_DIM + dims[None, None, :]
        o_s = tl.load(o_ptrs, mask=mask[:, :, None] & in_dim[None, None, :], other=0.0, cache_modifier=".cg")
        weights = _powers(m_s, m[None, :])
        total += tl.sum(l_s * weights, axis=0)
        acc += tl.sum(o_s * weights[:, :, None], axis=0)
    _store(out_ptr, out_head_stride, rows, dims, in_row[:, None] & in_dim[None, :], total, acc)


@triton.jit(do_not_specialize=["num_kv_heads", "window", "splits", "min_tiles", "table_stride"])
def paged_decode_kernel(
    q_ptr,  # [B, H, D]
    k_ptr,  # [N, P, K, D]
    v_ptr,  # [N, P, K, D]
    tables_ptr,  # [B, M]
    lengths_ptr,  # [B]
    out_ptr,  # [B, H, D]
    partial_o_ptr,  # [B * K, splits, G, D] float32
    partial_m_ptr,  # [B * K, splits, G] float32
    partial_l_ptr,  # [B * K, splits, G] float32
    tickets_ptr,  # [B * K or more] int32, zeros before and after
    scale,
    num_kv_heads,
    window,
    splits,
    min_tiles,
    table_stride,
    q_token_stride,
    q_head_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    out_token_stride,
    out_head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    pair, split = tl.program_id(0), tl.program_id(1)
    request, kv_head = (pair // num_kv_heads).to(tl.int64), (pair % num_kv_heads).to(tl.int64)
    length = tl.load(lengths_ptr + request).to(tl.int32)
    first = tl.maximum(length - window, 0)
    first_tile = first // BLOCK_N
    tiles = tl.maximum(tl.cdiv(tl.maximum(length, 0), BLOCK_N) - first_tile, 0)
    share = tl.maximum(tl.cdiv(tiles, splits), min_tiles)
    used = tl.cdiv(tiles, share)
    if split >= tl.maximum(used, 1):
        return  # an empty context still has its zeros to write
    begin = (first_tile + split * share) * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, length)

    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_dim = dims < HEAD_DIM
    mask = (rows < GROUP)[:, None] & in_dim[None, :]
    q_ptr += request * q_token_stride + kv_head * GROUP * q_head_stride
    table_ptr = tables_ptr + request * table_stride
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    if BLOCK_M == 1:
        m, total, acc = _attend_head(
            q_ptr, begin, end, first, length, scale, table_ptr, k_ptr, v_ptr, dims, in_dim,
            k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, BLOCK_N, BLOCK_D, KV_BLOCK, NUM_STAGES,
        )  # fmt: skip
    else:
        q = tl.load(q_ptr + rows[:, None] * q_head_stride + dims[None, :], mask=mask, other=0.0)
        m, total, acc = _attend_group(
            q, begin, end, first, length, scale, table_ptr, k_ptr, v_ptr, dims, in_dim,
            k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, BLOCK_M, BLOCK_N, BLOCK_D, KV_BLOCK,
            NUM_STAGES,
        )  # fmt: skip

    out_ptr += request * out_token_stride + kv_head * GROUP * out_head_stride
    if not SPLIT or used <= 1:
        _store(out_ptr, out_head_stride, rows, dims, mask, total, acc)
    else:
        partial = pair.to(tl.int64) * splits * GROUP
        row = partial + split * GROUP + rows
        tl.store(partial_m_ptr + row, m, mask=rows < GROUP)
        tl.store(partial_l_ptr + row, total, mask=rows < GROUP)
        tl.store(partial_o_ptr + row[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        # One thread takes the ticket: the barrier puts every thread's stores before it, acq_rel publishes them.
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets_ptr + pair, 1, sem="acq_rel")
        if ticket == used - 1:
            _combine(
                partial_o_ptr + partial * HEAD_DIM, partial_m_ptr + partial, partial_l_ptr + partial,
                out_ptr, out_head_stride, used, GROUP, HEAD_DIM, ROWS, BLOCK_D, CHUNK,
            )  # fmt: skip
            tl.store(tickets_ptr + pair, 0)  # all have arrived: ready for the next launch


_TICKETS: dict[torch.device, Tensor] = {}


def _tickets(device: torch.device) -> Tensor:  # [MAX_TICKETS] int32
    """Zeros that every launch leaves as zeros: 16 KB a device, kept for good.

    Decode launches of one device therefore follow each other, in one stream or in ordered ones. Never made inside a
    capture: the graph would hold both the memory and its clearing.
    """
    found = _TICKETS.get(device)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"paged_attention: expected one decode on {device} before a CUDA graph is captured")
        found = _TICKETS[device] = torch.zeros(MAX_TICKETS, dtype=torch.int32, device=device)
    return found


def decode(
    q: Tensor,  # [B, H, D]
    k_cache: Tensor,  # [N, P, K, D]
    v_cache: Tensor,  # [N, P, K, D]
    block_tables: Tensor,  # [B, M]
    context_lens: Tensor,  # [B]
    out: Tensor,  # [B, H, D], written
    scale: float,  # log2(e) included
    window: int,  # tokens that a query sees
) -> None:
    """Launcher; arguments as attention.py has checked them."""
    batch, num_heads, head_dim = q.shape
    kv_block, num_kv_heads = k_cache.shape[1:3]
    config = decode_config(
        batch, num_heads, num_kv_heads, head_dim, max(1, block_tables.shape[1] * kv_block), q.element_size(),
        capability_of(q.device), sm_count_of(q.device),
    )  # fmt: skip
    group, pairs = num_heads // num_kv_heads, batch * num_kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    tickets = _tickets(q.device)  # also where nothing is split: any decode prepares a device for captures
    partial_o = partial_m = partial_l = None
    if config.splits > 1:
        partial_m = torch.empty(pairs, config.splits, group, dtype=torch.float32, device=q.device)
        partial_l = torch.empty_like(partial_m)
        partial_o = partial_m.new_empty(pairs, config.splits, group, head_dim)
    rows = next_power_of_2(group)
    paged_decode_kernel[(pairs, config.splits)](
        q, k_cache, v_cache, block_tables, context_lens, out, partial_o, partial_m, partial_l, tickets,
        scale, num_kv_heads, window, config.splits, config.min_tiles, block_tables.stride(0),
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:2],
        GROUP=group, HEAD_DIM=head_dim, KV_BLOCK=kv_block, SPLIT=config.splits > 1,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, NUM_STAGES=config.num_stages,
        ROWS=rows, CHUNK=max(1, 4096 // (rows * block_d)), num_warps=config.num_warps, num_stages=config.num_stages,
        **pdl_options(capability_of(q.device)),
    )  # fmt: skip
