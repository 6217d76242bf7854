"""Optional q/k-norm, rotary embedding and the write to the paged KV cache: one launch for a batch of tokens.

    x' = x * rsqrt(mean_d(x^2) + eps) * gain       queries and keys, where there are gains; rounded to their dtype
    a' = a cos - b sin,  b' = b cos + a sin         their halves

Layout: q, k, v [T, heads, D] with dense heads, any stride between them (parts of one packed projection). Grid: one
program a token and head, query heads first, then keys, each with the value of the same KV head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.checks import expect, expect_caches, expect_places
from depthprune_runtime.kernels.launch import capability_of
from depthprune_runtime.kernels.packed import DTYPES
from depthprune_runtime.kernels.pdl import follow, pdl_options


@triton.jit
def _normalised(a, b, gain_ptr, pairs, inside, HALF_DIM, eps):
    """Both halves of a head after its norm, as the cache would hold them."""
    mean = (tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / (2 * HALF_DIM)
    rstd = tl.rsqrt(mean + eps)
    gain_a = tl.load(gain_ptr + pairs, mask=inside, other=0.0).to(tl.float32)
    gain_b = tl.load(gain_ptr + HALF_DIM + pairs, mask=inside, other=0.0).to(tl.float32)
    return a * rstd * gain_a, b * rstd * gain_b


@triton.jit
def rotary_kv_write_kernel(
    q_ptr,  # [T, H, D], in place
    k_ptr,  # [T, K, D], in place
    v_ptr,  # [T, K, D]
    q_gain_ptr,  # [H, D]
    k_gain_ptr,  # [K, D]
    cos_sin_ptr,  # [S, 2, D/2]
    positions_ptr,  # [T]
    k_cache_ptr,  # [N, P, K, D]
    v_cache_ptr,  # [N, P, K, D]
    slots_ptr,  # [T]
    num_heads,
    num_kv_heads,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    eps,
    HALF_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pairs = tl.arange(0, BLOCK)
    inside = pairs < HALF_DIM
    is_query = head < num_heads
    kv_head = head - num_heads
    dtype = q_ptr.dtype.element_ty
    if is_query:
        place = q_ptr + token * q_token_stride + head * q_head_stride + pairs
    else:
        place = k_ptr + token * k_token_stride + kv_head * k_head_stride + pairs
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + HALF_DIM, mask=inside, other=0.0).to(tl.float32)
    if Q_NORM:  # noqa: SIM102  known when compiled, the inner condition is not
        if is_query:
            a, b = _normalised(a, b, q_gain_ptr + head * 2 * HALF_DIM, pairs, inside, HALF_DIM, eps)
    if K_NORM:  # noqa: SIM102
        if head >= num_heads:
            a, b = _normalised(a, b, k_gain_ptr + kv_head * 2 * HALF_DIM, pairs, inside, HALF_DIM, eps)
    a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    row = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF_DIM) + pairs
    cos = tl.load(row, mask=inside, other=0.0)
    sin = tl.load(row + HALF_DIM, mask=inside, other=0.0)
    rotated_a, rotated_b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    tl.store(place, rotated_a, mask=inside)
    tl.store(place + HALF_DIM, rotated_b, mask=inside)
    slot = tl.load(slots_ptr + token)
    if (head >= num_heads) & (slot >= 0):
        target = (slot * num_kv_heads + kv_head) * (2 * HALF_DIM) + pairs
        tl.store(k_cache_ptr + target, rotated_a, mask=inside)
        tl.store(k_cache_ptr + target + HALF_DIM, rotated_b, mask=inside)
        value = v_ptr + token * v_token_stride + kv_head * v_head_stride + pairs
        tl.store(v_cache_ptr + target, tl.load(value, mask=inside, other=0.0), mask=inside)
        tl.store(v_cache_ptr + target + HALF_DIM, tl.load(value + HALF_DIM, mask=inside, other=0.0), mask=inside)


def _check(q: Tensor, k: Tensor, v: Tensor, gains: tuple[Tensor | None, Tensor | None]) -> None:
    op = "rotary_kv_write"
    if q.dim() != 3 or q.dtype not in DTYPES:
        raise ValueError(f"{op}: expected q of shape [T, H, D] in bfloat16, float16 or float32, got {list(q.shape)}")
    tokens, _, head_dim = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[0] != tokens or x.shape[2] != head_dim or x.stride(2) != 1 or head_dim % 2:
            raise ValueError(
                f"{op}: expected {name} of shape [{tokens}, heads, {head_dim}] with dense heads of an even size, "
                f"got {list(x.shape)}, strides {x.stride()}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{op}: expected {name} of {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    if v.shape != k.shape:
        raise ValueError(f"{op}: expected v of shape {list(k.shape)} (that of k), got {list(v.shape)}")
    for name, gain, x in (("q_norm", gains[0], q), ("k_norm", gains[1], k)):
        if gain is not None:
            expect(op, name, gain, tuple(x.shape[1:]), (q.dtype, torch.float32), q.device)


def rotary_kv_write(
    q: Tensor,  # [T, H, D], normalised and rotated in place
    k: Tensor,  # [T, K, D], normalised and rotated in place
    v: Tensor,  # [T, K, D]
    q_norm: Tensor | None,  # [H, D]
    k_norm: Tensor | None,  # [K, D]
    eps: float,
    cos_sin: Tensor,  # [S, 2, D/2] float32
    positions: Tensor,  # [T] int64
    k_cache: Tensor,  # [N, P, K, D], written in place
    v_cache: Tensor,  # [N, P, K, D], written in place
    slot_mapping: Tensor,  # [T] int64
) -> None:
    """Launcher of op `rotary_kv_write`; the contract is in depthprune_runtime/ops/rotary_kv_write.py."""
    op = "rotary_kv_write"
    _check(q, k, v, (q_norm, k_norm))
    if q.shape[0] == 0 or q.shape[2] == 0 or q.shape[1] + k.shape[1] == 0:
        return
    if k.shape[1]:
        expect_caches(op, k_cache, v_cache, k.dtype, k.device)
        if k_cache.shape[2:] != k.shape[1:]:
            wanted = f"[N, P, {k.shape[1]}, {k.shape[2]}]"
            raise ValueError(f"{op}: expected k_cache of shape {wanted}, got {list(k_cache.shape)}")
    expect_places(op, q, q.shape[2], cos_sin, positions, slot_mapping)
    half = q.shape[2] // 2
    with torch.cuda.device_of(q):
        rotary_kv_write_kernel[(q.shape[0], q.shape[1] + k.shape[1])](
            q, k, v, q_norm, k_norm, cos_sin, positions, k_cache, v_cache, slot_mapping, q.shape[1], k.shape[1],
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), eps,
            HALF_DIM=half, BLOCK=triton.next_power_of_2(half), Q_NORM=q_norm is not None, K_NORM=k_norm is not None,
            num_warps=1,  # a head is one short row
            **pdl_options(capability_of(q.device)),
        )  # fmt: skip
