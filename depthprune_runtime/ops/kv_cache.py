"""Writing new keys and values into the paged KV cache of one attention sub-layer."""

from __future__ import annotations

from torch import Tensor

from depthprune_runtime.ops._library import define


def _kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


_kv_write_op = define(
    "kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()", _kv_write
)


def kv_write(
    k: Tensor,  # [T, K, D]
    v: Tensor,  # [T, K, D]
    k_cache: Tensor,  # [N, P, K, D]: N kv_blocks of P tokens, written in place
    v_cache: Tensor,  # [N, P, K, D], written in place
    slot_mapping: Tensor,  # [T] int64: kv_block * P + offset of each token
) -> None:
    """Store one batch of keys and values at their slots."""
    _kv_write_op(k, v, k_cache, v_cache, slot_mapping)
