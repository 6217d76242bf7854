"""The two residual sub-layers. Each maps normalised input to what is added to the residual stream.

`inner` and `project` are apart because closed-form methods re-solve the projection from the inner
activations: the heads' outputs of attention, psi of the FFN.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.model.batch import Batch
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.spec import AttentionSpec, FFNSpec, SublayerSpec

KVPair = tuple[Tensor, Tensor]  # k_cache, v_cache: [N, P, K, D] each


class Attention:
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, spec: AttentionSpec, tensors: Mapping[str, Tensor], eps: float, rotary: RotaryTable) -> None:
        self.spec = spec
        self.norm = tensors["norm.weight"]  # [C]
        self._qkv = tensors["qkv_proj.weight"]  # [(H + 2K) D, C]
        self._qkv_bias = tensors.get("qkv_proj.bias")  # [(H + 2K) D]
        self._q_norm = tensors.get("q_norm.weight")  # [H, D]
        self._k_norm = tensors.get("k_norm.weight")  # [K, D]
        self._o = tensors["o_proj.weight"]  # [C, H D]
        self._o_bias = tensors.get("o_proj.bias")  # [C]
        self._eps = eps
        self._rotary = rotary
        self._scale = spec.head_dim**-0.5
        self._window = spec.sliding_window or 0

    @property
    def output_weight(self) -> Tensor:  # [C, H D]
        return self._o

    def inner(self, hidden: Tensor, batch: Batch, kv: KVPair | None = None) -> Tensor:  # [T, C] -> [T, H D]
        spec = self.spec
        qkv = ops.linear(hidden, self._qkv, self._qkv_bias)
        heads = qkv.view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if self._q_norm is not None and self._k_norm is not None:
            ops.head_rms_norm(q, self._q_norm, self._eps)
            ops.head_rms_norm(k, self._k_norm, self._eps)
        ops.rotary(q, k, self._rotary.rows(batch.max_position + 1), batch.positions)
        paged = batch.paged
        if paged is not None and kv is not None:
            ops.kv_write(k, v, kv[0], kv[1], paged.slot_mapping)
        if paged is None or kv is None or paged.fresh:
            out = ops.varlen_attention(q, k, v, batch.cu_seqlens, self._scale, self._window)
        else:
            out = ops.paged_attention(
                q, kv[0], kv[1], paged.block_tables, paged.context_lens, batch.cu_seqlens, self._scale, self._window
            )
        return out.reshape(-1, spec.q_size)

    def project(self, inner: Tensor) -> Tensor:  # [T, H D] -> [T, C]
        return ops.linear(inner, self._o, self._o_bias)

    def __call__(self, hidden: Tensor, batch: Batch, kv: KVPair | None = None) -> Tensor:  # [T, C] -> [T, C]
        return self.project(self.inner(hidden, batch, kv))


class FFN:
    """Gated FFN."""

    def __init__(self, spec: FFNSpec, tensors: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.norm = tensors["norm.weight"]  # [C]
        self._gate_up = tensors["gate_up_proj.weight"]  # [2F, C], gate rows first
        self._down = tensors["down_proj.weight"]  # [C, F]
        self._down_bias = tensors.get("down_proj.bias")  # [C]

    @property
    def output_weight(self) -> Tensor:  # [C, F]
        return self._down

    def inner(self, hidden: Tensor, batch: Batch, kv: KVPair | None = None) -> Tensor:  # [T, C] -> [T, F]
        return ops.silu_mul(ops.linear(hidden, self._gate_up))

    def project(self, inner: Tensor) -> Tensor:  # [T, F] -> [T, C]
        return ops.linear(inner, self._down, self._down_bias)

    def __call__(self, hidden: Tensor, batch: Batch, kv: KVPair | None = None) -> Tensor:  # [T, C] -> [T, C]
        return self.project(self.inner(hidden, batch, kv))


Sublayer = Attention | FFN


def build_sublayer(
    spec: SublayerSpec, tensors: Mapping[str, Tensor], eps: float, rotary: RotaryTable | None
) -> Sublayer:
    """Sub-layer over `tensors` (short names, see `tensor_shapes`); attention needs its rotary table."""
    if isinstance(spec, FFNSpec):
        return FFN(spec, tensors)
    assert rotary is not None
    return Attention(spec, tensors, eps, rotary)
