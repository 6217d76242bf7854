"""What lies between the qkv projection of an attention sub-layer and its attention, as one op.

    q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)    per head, where there are gains (q/k-norm)
    q, k = rotary(q, k)                                 at `positions`
    k_cache[slot], v_cache[slot] = k, v                 at `slot_mapping`, where it is not negative

The reference is those three ops one after the other, which round after each; a fused kernel rounds once.
"""

from __future__ import annotations

from torch import Tensor

from depthprune_runtime.ops._library import define
from depthprune_runtime.ops.kv_cache import kv_write
from depthprune_runtime.ops.norm import head_rms_norm
from depthprune_runtime.ops.rotary import rotary


def _rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    for name, x, gain in (("q_norm", q, q_norm), ("k_norm", k, k_norm)):
        if gain is not None and gain.shape != x.shape[-2:]:
            raise ValueError(f"rotary_kv_write: expected {name} of shape {list(x.shape[-2:])}, got {list(gain.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"rotary_kv_write: expected v of shape {list(k.shape)} (that of k), got {list(v.shape)}")
    if q_norm is not None:
        head_rms_norm(q, q_norm, eps)
    if k_norm is not None:
        head_rms_norm(k, k_norm, eps)
    rotary(q, k, cos_sin, positions)
    kept = slot_mapping >= 0
    if not kept.all():
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    kv_write(k, v, k_cache, v_cache, slot_mapping)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Nothing is returned; the reference reads the slots, which fake tensors do not have."""


_rotary_kv_write_op = define(
    "rotary_kv_write(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps, Tensor cos_sin, "
    "Tensor positions, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor slot_mapping) -> ()",
    _rotary_kv_write,
    _fake,
)


def rotary_kv_write(
    q: Tensor,  # [T, H, D], normalised and rotated in place
    k: Tensor,  # [T, K, D], normalised and rotated in place
    v: Tensor,  # [T, K, D]
    q_norm: Tensor | None,  # [H, D], None: queries are not normalised
    k_norm: Tensor | None,  # [K, D], None: keys are not normalised
    eps: float,
    cos_sin: Tensor,  # [S, 2, D/2] float32
    positions: Tensor,  # [T] int64, < S
    k_cache: Tensor,  # [N, P, K, D]: N kv_blocks of P tokens, written in place
    v_cache: Tensor,  # [N, P, K, D], written in place
    slot_mapping: Tensor,  # [T] int64: kv_block * P + offset of each token, all different; negative: store nothing
) -> None:
    """Normalise and rotate one batch of queries and keys; store its keys and values at their slots."""
    _rotary_kv_write_op(q, k, v, q_norm, k_norm, eps, cos_sin, positions, k_cache, v_cache, slot_mapping)
