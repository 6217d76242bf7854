"""RMSNorm, QKV projection, bias, rotary embedding and the write to the paged KV cache, for up to 64 tokens.

    a' = a cos - b sin,  b' = b cos + a sin      a, b: rows d and D/2 + d of a head's projection

Grid: one program per BLOCK_N / 2 pairs of rows of one head, so that both halves of a pair meet in one tile; query
heads first, then keys, then values (not rotated), as in the weight. Inner loop: `rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.checks import expect_caches, expect_places
from depthprune_runtime.kernels.few_tokens import configure, halves, products, weight_arguments
from depthprune_runtime.kernels.launch import capability_of
from depthprune_runtime.kernels.launch_few_tokens import MAX_TOKENS
from depthprune_runtime.kernels.packed import check_norm, check_packed, few


@triton.jit
def _rotated(a, b, positions, table_ptr, pair, mask, HALF_DIM):
    """Both halves of the pairs [HALF, BLOCK_T] at their positions; as they are outside `mask`."""
    places = table_ptr + positions[None, :] * (2 * HALF_DIM) + pair[:, None]
    cos = tl.load(places, mask=mask, other=1.0)
    sin = tl.load(places + HALF_DIM, mask=mask, other=0.0)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def norm_qkv_kernel(
    x_ptr,  # [T, C]
    gain_ptr,  # [C]
    weight_ptr,  # [(H + 2K) D, C], or words [P, tiles, 16]
    scales_ptr,  # [P, G, 16]
    zeros_ptr,  # [P, G, 16]
    bias_ptr,  # [(H + 2K) D]
    cos_sin_ptr,  # [S, 2, D/2] float32
    positions_ptr,  # [T] int64
    slots_ptr,  # [T] int64
    q_ptr,  # [T, H, D]
    k_cache_ptr,  # [N, P, K, D]
    v_cache_ptr,  # [N, P, K, D]
    num_tokens,
    C: tl.constexpr,
    x_stride,
    eps,
    num_heads,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
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
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(0)
    slot = tl.arange(0, BLOCK_N)
    pair = tl.program_id(1) * HALF + slot % HALF
    rows = head * HEAD_DIM + pair + (slot // HALF) * HALF_DIM
    rows_in = pair < HALF_DIM
    acc = products(
        x_ptr, x_stride, gain_ptr, weight_ptr, scales_ptr, zeros_ptr, rows, rows_in, num_tokens, C, eps,
        True, QUANTIZED, BITS, GROUP, HAS_ZEROS, WHOLE_PANELS, BLOCK_T, BLOCK_N, BLOCK_K, EVEN_K, USE_DOT, STAGES, PDL,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows_in, other=0.0).to(tl.float32)[:, None]
    # q, k and v are rounded before the rotation, as the reference does: a key must not depend on who computed it
    dtype = q_ptr.dtype.element_ty
    a, b = halves(acc.to(dtype).to(tl.float32), BLOCK_T, BLOCK_N)  # [HALF, BLOCK_T]

    tokens = tl.arange(0, BLOCK_T)
    in_tokens = tokens < num_tokens
    pair = tl.program_id(1) * HALF + tl.arange(0, HALF)
    inside = (pair < HALF_DIM)[:, None] & in_tokens[None, :]
    first_value = num_heads + num_kv_heads  # heads from here on are not rotated
    heads = (head + tl.zeros([HALF], tl.int32))[:, None]  # a tile, as masks are
    positions = tl.load(positions_ptr + tokens, mask=in_tokens, other=0)
    a, b = _rotated(a, b, positions, cos_sin_ptr, pair, inside & (heads < first_value), HALF_DIM)
    a, b = a.to(dtype), b.to(dtype)

    query = q_ptr + (tokens * num_heads + head)[None, :] * HEAD_DIM + pair[:, None]
    tl.store(query, a, mask=inside & (heads < num_heads))
    tl.store(query + HALF_DIM, b, mask=inside & (heads < num_heads))
    slots = tl.load(slots_ptr + tokens, mask=in_tokens, other=-1)
    kept = inside & (slots >= 0)[None, :]
    kv_head = head - num_heads
    key = k_cache_ptr + (slots * num_kv_heads + kv_head)[None, :] * HEAD_DIM + pair[:, None]
    is_key = kept & (heads >= num_heads) & (heads < first_value)
    tl.store(key, a, mask=is_key)
    tl.store(key + HALF_DIM, b, mask=is_key)
    is_value = kept & (heads >= first_value)
    value = v_cache_ptr + (slots * num_kv_heads + kv_head - num_kv_heads)[None, :] * HEAD_DIM + pair[:, None]
    tl.store(value, a, mask=is_value)
    tl.store(value + HALF_DIM, b, mask=is_value)


def _check(x: Tensor, layout: list[int], k_cache: Tensor, v_cache: Tensor) -> int:
    """Number of query heads."""
    expect_caches("norm_qkv", k_cache, v_cache, x.dtype, x.device)
    if k_cache.shape[3] % 2:
        raise ValueError(f"norm_qkv: expected heads of an even size, got {k_cache.shape[3]}")
    kv_heads, head_dim = k_cache.shape[2:]
    heads, rest = divmod(layout[0], head_dim)
    if rest or heads <= 2 * kv_heads or heads % kv_heads:
        raise ValueError(
            f"norm_qkv: expected a weight of (H + 2 * {kv_heads}) * {head_dim} rows, H a multiple of {kv_heads}, "
            f"got {layout[0]}"
        )
    return int(heads - 2 * kv_heads)


def takes(x: Tensor) -> bool:
    """Whether the launcher takes x [T, K]; for other numbers of tokens the reference is the better one."""
    return few(x, MAX_TOKENS)


def norm_qkv(
    x: Tensor,  # [T, C]
    norm: Tensor,  # [C]
    eps: float,
    weight: list[Tensor],
    layout: list[int],
    bias: Tensor | None,  # [(H + 2K) D]
    cos_sin: Tensor,  # [S, 2, D/2] float32
    positions: Tensor,  # [T] int64
    slot_mapping: Tensor,  # [T] int64
    k_cache: Tensor,  # [N, P, K, D], written in place
    v_cache: Tensor,  # [N, P, K, D], written in place
) -> Tensor:  # [T, H, D]
    """Launcher of op `norm_qkv`; the contract is in depthprune_runtime/ops/norm_qkv.py."""
    check_packed("norm_qkv", x, weight, layout, bias)
    check_norm("norm_qkv", x, norm)
    num_heads = _check(x, layout, k_cache, v_cache)
    expect_places("norm_qkv", x, k_cache.shape[3], cos_sin, positions, slot_mapping)
    kv_heads, head_dim = k_cache.shape[2:]
    config, constants = configure(x, weight, layout, capability_of(x.device), apart=head_dim // 2)
    q = x.new_empty(x.shape[0], num_heads, head_dim)
    grid = (num_heads + 2 * kv_heads, triton.cdiv(head_dim // 2, config.block_n // 2))
    with torch.cuda.device_of(x):
        norm_qkv_kernel[grid](
            x, norm, *weight_arguments(weight, layout), bias, cos_sin, positions, slot_mapping, q, k_cache, v_cache,
            x.shape[0], x.shape[1], x.stride(0), eps, num_heads, kv_heads,
            HEAD_DIM=head_dim, HAS_BIAS=bias is not None, **constants,
        )  # fmt: skip
    return q
