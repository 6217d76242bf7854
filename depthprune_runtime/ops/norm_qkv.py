"""From the residual stream to queries at their positions, keys and values in the cache: one launch on a GPU.

    (q, k, v) = W rms_norm(x) + b,    rotary(q), rotary(k),    k, v written to their slots

For attention without q/k-norm, whose statistics need whole heads.
"""

from __future__ import annotations

from torch import Tensor

from depthprune_runtime.ops._library import define
from depthprune_runtime.ops.norm import rms_norm
from depthprune_runtime.ops.projection import packed_projection
from depthprune_runtime.ops.rotary import rotary
from depthprune_runtime.weights.packed import pack
from depthprune_runtime.weights.rows import Stored


def _norm_qkv(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: list[Tensor],
    layout: list[int],
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    if k_cache.dim() != 4 or k_cache.shape[3] < 1:
        raise ValueError(f"norm_qkv: expected k_cache of shape [N, P, K, D], D >= 1, got {list(k_cache.shape)}")
    kv_heads, head_dim = k_cache.shape[2:]
    heads = layout[0] // head_dim - 2 * kv_heads
    qkv = packed_projection(rms_norm(x, norm, eps), weight, layout, bias)
    q, k, v = qkv.view(x.shape[0], -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    rotary(q, k, cos_sin, positions)
    written = slot_mapping >= 0
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping[written], k[written])
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping[written], v[written])
    out: Tensor = q.contiguous()
    return out


_norm_qkv_op = define(
    "norm_qkv(Tensor x, Tensor norm, float eps, Tensor[] weight, int[] layout, Tensor? bias, Tensor cos_sin, "
    "Tensor positions, Tensor slot_mapping, Tensor(a!) k_cache, Tensor(b!) v_cache) -> Tensor",
    _norm_qkv,
)


def norm_qkv(
    x: Tensor,  # [T, C]
    norm: Tensor,  # [C]
    eps: float,
    weight: Stored,  # [(H + 2K) D, C]
    bias: Tensor | None,  # [(H + 2K) D]
    cos_sin: Tensor,  # [S, 2, D/2] float32
    positions: Tensor,  # [T] int64, < S
    slot_mapping: Tensor,  # [T] int64: kv_block * P + offset of each token; negative: its key and value are not kept
    k_cache: Tensor,  # [N, P, K, D], written in place
    v_cache: Tensor,  # [N, P, K, D], written in place
) -> Tensor:  # [T, H, D]
    """Rotated queries; keys and values go to the cache."""
    out: Tensor = _norm_qkv_op(x, norm, eps, *pack(weight), bias, cos_sin, positions, slot_mapping, k_cache, v_cache)
    return out
