"""Causal attention of a ragged batch of queries, over packed keys or over the paged cache, for CUDA devices.

    out_t = sum_s p_ts v_s / l_t    p_ts = 2^(c q_t . k_s - m_t), l_t = sum_s p_ts, c = scale * log2(e)

over keys s <= t, s > t - window, tile by tile with running m and l in float32 (Dao, arXiv 2307.08691). The queries of
a sequence are the last of its context; a query without keys gives zeros.
Layout: head_dim is contiguous everywhere, the other strides are free: q, k, v may be slices of one projection. Rows of
a tile are tokens times the H / K query heads of a KV group, so any head count packs and a group reads its keys once.
Grid: (T // tokens a tile + B, K), a bound that needs no lengths. Sequence b owns the tiles from
cu_seqlens[b] // tokens + b, which its program finds on the device; the one or none it does not need exits at once.
A row's result depends on its own sequence alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.dot import dot
from depthprune_runtime.kernels.key_rows import paged_rows
from depthprune_runtime.kernels.launch import capability_of, next_power_of_2
from depthprune_runtime.kernels.launch_attention import NO_WINDOW, prefill_config


@triton.jit
def _sequence_of(tile, bounds_ptr, num_requests, TILE_TOKENS: tl.constexpr):
    """Largest b with cu_seqlens[b] // TILE_TOKENS + b <= tile: these starts rise, so it is their count less one."""
    count = 0
    for chunk in range(0, num_requests, 128):
        requests = chunk + tl.arange(0, 128)
        bounds = tl.load(bounds_ptr + requests, mask=requests < num_requests, other=0).to(tl.int32)
        starts = bounds // TILE_TOKENS + requests
        count += tl.sum(((starts <= tile) & (requests < num_requests)).to(tl.int32), axis=0)
    return count - 1


@triton.jit
def _attend(
    q, m, total, acc, begin, end, first, positions, window, scale, k_ptr, v_ptr, table_ptr, dims, in_dim,
    k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
    MASKED: tl.constexpr, PAGED: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tiles of keys begin .. end; without MASKED all of them are seen by all rows."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        # Neither beyond the context nor before the window is anything read: those kv_blocks may be another's.
        readable = (keys >= first) & (keys < end)
        if PAGED:
            k_rows = paged_rows(keys, readable, table_ptr, KV_BLOCK, k_block_stride, k_slot_stride)
            v_rows = paged_rows(keys, readable, table_ptr, KV_BLOCK, v_block_stride, v_slot_stride)
        else:
            k_rows = keys.to(tl.int64) * k_slot_stride
            v_rows = keys.to(tl.int64) * v_slot_stride
        k_ptrs, v_ptrs = k_ptr + k_rows[:, None] + dims[None, :], v_ptr + v_rows[:, None] + dims[None, :]
        if MASKED:
            k = tl.load(k_ptrs, mask=readable[:, None] & in_dim[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=readable[:, None] & in_dim[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs, mask=in_dim[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=in_dim[None, :], other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if MASKED:
            seen = readable[None, :] & (keys[None, :] <= positions[:, None])
            seen &= keys[None, :] > positions[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1) * scale)
        # A row may see no key yet: -inf less -inf is no number.
        base = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(scores * scale - base[:, None])
        alpha = tl.exp2(m - base)
        total = total * alpha + tl.sum(p, axis=1)
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = m_new
    return m, total, acc


@triton.jit(do_not_specialize=["num_requests", "window", "table_stride"])
def prefill_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, K, D], or [N, P, K, D] where PAGED
    v_ptr,  # like k
    tables_ptr,  # [B, M] where PAGED
    lengths_ptr,  # [B] where PAGED
    bounds_ptr,  # [B + 1]
    out_ptr,  # [T, H, D]
    scale,
    num_requests,
    window,
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
    PAGED: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The last tiles of a long sequence have the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    request = _sequence_of(tile, bounds_ptr, num_requests, TILE_TOKENS)
    start = tl.load(bounds_ptr + request)
    num_queries = (tl.load(bounds_ptr + request + 1) - start).to(tl.int32)
    query = (tile - request - (start // TILE_TOKENS).to(tl.int32)) * TILE_TOKENS
    if query >= num_queries:
        return

    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_dim = dims < HEAD_DIM
    tokens = query + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    mask = ((rows < TILE_TOKENS * GROUP) & (tokens < num_queries))[:, None] & in_dim[None, :]
    q_rows = (start + tokens).to(tl.int64) * q_token_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=mask, other=0.0)

    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    if PAGED:
        context = tl.load(lengths_ptr + request).to(tl.int32)
        table_ptr = tables_ptr + request.to(tl.int64) * table_stride
    else:
        context = num_queries
        table_ptr = tables_ptr
        k_ptr += start.to(tl.int64) * k_slot_stride
        v_ptr += start.to(tl.int64) * v_slot_stride
    earlier = context - num_queries
    positions = earlier + tokens
    first_row = earlier + query
    last_row = earlier + tl.minimum(query + TILE_TOKENS, num_queries) - 1
    first = tl.maximum(first_row - window + 1, 0)
    end = last_row + 1
    # Keys first .. full: some rows' windows begin; full .. causal: seen by all rows; causal .. end: later than some.
    causal = tl.maximum(first_row + 1, 0) // BLOCK_N * BLOCK_N
    full = 0
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOWED:
        full = tl.cdiv(tl.maximum(last_row - window + 1, 0), BLOCK_N) * BLOCK_N
        m, total, acc = _attend(
            q, m, total, acc, first // BLOCK_N * BLOCK_N, tl.minimum(full, end), first, positions, window, scale,
            k_ptr, v_ptr, table_ptr, dims, in_dim, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
            True, PAGED, KV_BLOCK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    m, total, acc = _attend(
        q, m, total, acc, full, causal, first, positions, window, scale,
        k_ptr, v_ptr, table_ptr, dims, in_dim, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
        False, PAGED, KV_BLOCK, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    m, total, acc = _attend(
        q, m, total, acc, tl.maximum(full, causal), end, first, positions, window, scale,
        k_ptr, v_ptr, table_ptr, dims, in_dim, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
        True, PAGED, KV_BLOCK, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_rows = (start + tokens).to(tl.int64) * out_token_stride + heads * out_head_stride
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def prefill(
    q: Tensor,  # [T, H, D]
    k: Tensor,  # [T, K, D], or the cache [N, P, K, D]
    v: Tensor,  # like k
    block_tables: Tensor | None,  # [B, M] with a cache
    context_lens: Tensor | None,  # [B] with a cache
    cu_seqlens: Tensor,  # [B + 1]
    out: Tensor,  # [T, H, D], written
    scale: float,  # log2(e) included
    window: int,  # tokens that a query sees
) -> None:
    """Launcher; arguments as attention.py has checked them."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[-2]
    paged = block_tables is not None
    config = prefill_config(num_heads, num_kv_heads, head_dim, q.element_size(), paged, capability_of(q.device))
    group, num_requests = num_heads // num_kv_heads, cu_seqlens.shape[0] - 1
    tile_tokens = config.block_m // group
    if not paged:
        k, v = k[None], v[None]  # one kv_block of all tokens, whose first stride is not used
    prefill_kernel[(num_tokens // tile_tokens + num_requests, num_kv_heads)](
        q, k, v, block_tables, context_lens, cu_seqlens, out,
        scale, num_requests, window, block_tables.stride(0) if paged else 0,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2],
        GROUP=group, HEAD_DIM=head_dim, PAGED=paged, KV_BLOCK=k.shape[1] if paged else 1, WINDOWED=window != NO_WINDOW,
        TILE_TOKENS=tile_tokens, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
