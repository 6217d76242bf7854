"""Causal grouped-query attention: over fresh sequences, and over the paged KV cache.

    out_t = softmax_s(scale * q_t . k_s) v_s    over s <= t, and s > t - window if there is one

A soft cap c puts c tanh(score / c) in place of a score; no kernel has it, and plain torch runs.

H query heads share K key/value heads, H / K neighbours each. Sources: Vaswani et al., arXiv 1706.03762;
Ainslie et al., arXiv 2305.13245; paging: Kwon et al., arXiv 2309.06180.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from depthprune_runtime.ops._library import define


def _causal_mask(num_queries: int, context: int, window: int, device: torch.device) -> Tensor:
    """[num_queries, context] bool; the queries are the last `num_queries` positions of the context."""
    query = torch.arange(context - num_queries, context, device=device)[:, None]
    key = torch.arange(context, device=device)[None, :]
    mask = key <= query
    return mask & (key > query - window) if window > 0 else mask


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """`_attend` with a soft cap."""
    (num_queries, num_heads, head_dim), (context, kv_heads, _) = q.shape, k.shape
    grouped = q.view(num_queries, kv_heads, num_heads // kv_heads, head_dim).float()
    scores = torch.einsum("tkgd,skd->kgts", grouped, k.float()) * scale
    scores = (scores / softcap).tanh_().mul_(softcap)
    scores.masked_fill_(~_causal_mask(num_queries, context, window, q.device), -torch.inf)
    out = torch.einsum("kgts,skd->tkgd", scores.softmax(-1), v.float())
    return out.reshape(q.shape).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """One sequence: q [Tq, H, D] are the last Tq of the S tokens in k, v [S, K, D]."""
    num_queries, num_heads, head_dim = q.shape
    if num_queries == 1:
        if window > 0:
            k, v = k[-window:], v[-window:]
        # A group's query heads become rows of one unmasked attention: torch would copy K and V H/K times.
        grouped = q.view(1, k.shape[1], num_heads // k.shape[1], head_dim)
        out = sdpa(grouped, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scale)
        return out.view(1, num_heads, head_dim)
    return _attend_many(q[None], k[None], v[None], scale, window)[0]


def _attend_many(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """B sequences of one length: q [B, Tq, H, D] are the last Tq of the S tokens in k, v [B, S, K, D]."""
    num_queries, context = q.shape[1], k.shape[1]
    plain = context == num_queries and (window <= 0 or window >= context)
    mask = None if plain else _causal_mask(num_queries, context, window, q.device)
    out = sdpa(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int) -> Tensor:
    bounds = cu_seqlens.tolist()
    if len(bounds) == 2:
        return _attend(q, k, v, scale, window)
    lengths = {end - start for start, end in itertools.pairwise(bounds)}
    if len(lengths) == 1:  # one call spreads sequences over the threads
        shape = (len(bounds) - 1, lengths.pop())
        many = _attend_many(q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape), scale, window)
        return many.flatten(0, 1)
    out = torch.empty_like(q)
    for start, end in itertools.pairwise(bounds):
        out[start:end] = _attend(q[start:end], k[start:end], v[start:end], scale, window)
    return out


def _gather(cache: Tensor, blocks: list[int], length: int) -> Tensor:
    """[length, K, D] of one request: a view where its kv_blocks are consecutive, else a copy."""
    size = cache.shape[1]
    used = blocks[: -(-length // size)]
    if used == list(range(used[0], used[0] + len(used))):
        start = used[0] * size
        return cache.flatten(0, 1)[start : start + length]
    return cache[torch.tensor(used, device=cache.device)].flatten(0, 1)[:length]


def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    attend = partial(_attend, scale=scale, window=window)
    return _each_request(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, attend)


def _each_request(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    bounds = cu_seqlens_q.tolist()
    tables = block_tables.tolist()
    parts = []
    for i, length in enumerate(context_lens.tolist()):
        k = _gather(k_cache, tables[i], length)
        v = _gather(v_cache, tables[i], length)
        parts.append(attend(q[bounds[i] : bounds[i + 1]], k, v))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _like_query(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)


_varlen_attention_op = define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, int window) -> Tensor",
    _varlen_attention,
    fake=_like_query,
)
_paged_attention_op = define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens, "
    "Tensor cu_seqlens_q, float scale, int window) -> Tensor",
    _paged_attention,
    fake=_like_query,
)


def varlen_attention(
    q: Tensor,  # [T, H, D]
    k: Tensor,  # [T, K, D]
    v: Tensor,  # [T, K, D]
    cu_seqlens: Tensor,  # [B + 1] int: sequence b is tokens cu_seqlens[b] .. cu_seqlens[b + 1]
    scale: float,
    window: int = 0,  # tokens a query sees, itself included; 0: all
    softcap: float = 0.0,  # 0: none
) -> Tensor:  # [T, H, D]
    """Causal attention within each of B packed sequences, without a cache."""
    if softcap:
        capped = partial(_attend_capped, scale=scale, window=window, softcap=softcap)
        parts = itertools.pairwise(cu_seqlens.tolist())
        return torch.cat([capped(q[a:b], k[a:b], v[a:b]) for a, b in parts])
    out: Tensor = _varlen_attention_op(q, k, v, cu_seqlens, scale, window)
    return out


def paged_attention(
    q: Tensor,  # [T, H, D], the newest tokens of each request
    k_cache: Tensor,  # [N, P, K, D], already holding the newest tokens
    v_cache: Tensor,  # [N, P, K, D]
    block_tables: Tensor,  # [B, M] int: kv_blocks of each request in order
    context_lens: Tensor,  # [B] int: tokens in the cache, the newest included
    cu_seqlens_q: Tensor,  # [B + 1] int: queries of each request
    scale: float,
    window: int = 0,  # tokens a query sees, itself included; 0: all
    softcap: float = 0.0,  # 0: none
) -> Tensor:  # [T, H, D]
    """Causal attention of each request's newest tokens over its whole context in the cache."""
    if softcap:
        capped = partial(_attend_capped, scale=scale, window=window, softcap=softcap)
        return _each_request(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, capped)
    out: Tensor = _paged_attention_op(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, window)
    return out
