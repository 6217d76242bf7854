"""Launchers of the attention ops for CUDA devices: they check, then choose prefill or decode by shapes alone.

The contract is in depthprune_runtime/ops/attention.py. No launcher reads a value on the host, so none waits for the
device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from depthprune_runtime.kernels.attention_decode import decode
from depthprune_runtime.kernels.attention_prefill import prefill
from depthprune_runtime.kernels.launch_attention import NO_WINDOW

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG2_E = math.log2(math.e)


def _check(op: str, q: Tensor, keys: dict[str, Tensor], metadata: dict[str, tuple[Tensor, int]], scale: float) -> None:
    if q.dtype not in _DTYPES:
        raise ValueError(f"{op}: expected q of dtype bfloat16, float16 or float32, got {q.dtype}")
    if q.dim() != 3:
        raise ValueError(f"{op}: expected q [T, H, D], got {list(q.shape)}")
    if not scale > 0:
        raise ValueError(f"{op}: expected scale > 0, got {scale}")
    shapes = [t.shape for t in keys.values()]
    for name, t in keys.items():
        if t.dim() < 3 or t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{op}: expected {name} of {q.dtype} on {q.device} like q, got {t.dtype} on {t.device}")
        if t.shape != shapes[0] or t.shape[-1] != q.shape[-1]:
            expected = [*shapes[0][:-1], q.shape[-1]]
            raise ValueError(f"{op}: expected {name} of shape {expected}, got {list(t.shape)}")
    for name, (t, dims) in metadata.items():
        if t.dtype not in (torch.int64, torch.int32) or t.device != q.device or t.dim() != dims:
            raise ValueError(
                f"{op}: expected {name} of int64, {dims} dimension(s), on {q.device}, "
                f"got {t.dtype} {list(t.shape)} on {t.device}"
            )


def _dense(t: Tensor) -> Tensor:
    """`t`, or a copy where its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _tokens_seen(window: int) -> int:
    return min(window, NO_WINDOW) if window > 0 else NO_WINDOW


def varlen_attention(
    q: Tensor,  # [T, H, D]
    k: Tensor,  # [T, K, D]
    v: Tensor,  # [T, K, D]
    cu_seqlens: Tensor,  # [B + 1] int
    scale: float,
    window: int,
) -> Tensor:  # [T, H, D]
    """Launcher of op `varlen_attention`."""
    op = "varlen_attention"
    _check(op, q, {"k": k, "v": v}, {"cu_seqlens": (cu_seqlens, 1)}, scale)
    if k.dim() != 3 or k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: expected k [T, K, D] with T = {q.shape[0]}, got {list(k.shape)}")
    out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    q, k, v, target = _dense(q), _dense(k), _dense(v), _dense(out)
    with torch.cuda.device_of(q):  # Triton launches on the current device, not on that of the tensors
        prefill(q, k, v, None, None, cu_seqlens.contiguous(), target, scale * _LOG2_E, _tokens_seen(window))
    return out if target is out else out.copy_(target)


def paged_attention(
    q: Tensor,  # [T, H, D]
    k_cache: Tensor,  # [N, P, K, D]
    v_cache: Tensor,  # [N, P, K, D]
    block_tables: Tensor,  # [B, M] int
    context_lens: Tensor,  # [B] int
    cu_seqlens_q: Tensor,  # [B + 1] int
    scale: float,
    window: int,
) -> Tensor:  # [T, H, D]
    """Launcher of op `paged_attention`. Every request has a query, so as many queries as requests are a decode."""
    op = "paged_attention"
    metadata = {"block_tables": (block_tables, 2), "context_lens": (context_lens, 1), "cu_seqlens_q": (cu_seqlens_q, 1)}
    _check(op, q, {"k_cache": k_cache, "v_cache": v_cache}, metadata, scale)
    if k_cache.dim() != 4 or 0 in k_cache.shape or block_tables.shape[1] < 1:
        raise ValueError(
            f"{op}: expected k_cache [N, P, K, D] and block_tables [B, M] of at least 1 each, "
            f"got {list(k_cache.shape)} and {list(block_tables.shape)}"
        )
    batch = context_lens.shape[0]
    for name, size in (("block_tables", block_tables.shape[0]), ("cu_seqlens_q", cu_seqlens_q.shape[0] - 1)):
        if size != batch:
            raise ValueError(f"{op}: expected {name} of {batch} requests like context_lens, got {size}")
    out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    q, k_cache, v_cache, target = _dense(q), _dense(k_cache), _dense(v_cache), _dense(out)
    block_tables, context_lens = _dense(block_tables), context_lens.contiguous()
    scale *= _LOG2_E
    with torch.cuda.device_of(q):
        if q.shape[0] == batch:
            decode(q, k_cache, v_cache, block_tables, context_lens, target, scale, _tokens_seen(window))
        else:
            bounds, seen = cu_seqlens_q.contiguous(), _tokens_seen(window)
            prefill(q, k_cache, v_cache, block_tables, context_lens, bounds, target, scale, seen)
    return out if target is out else out.copy_(target)
