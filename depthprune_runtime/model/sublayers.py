"""The two residual sub-layers. Each maps the residual stream to what is added to it:

    f(x) = leave(project(inner(enter(x))))

`enter` is the norm. `inner` and `project` are apart because closed-form methods re-solve the projection from the inner
activations: the heads' outputs of attention, psi of the FFN. `leave` is where a norm after the projection belongs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.model.batch import Batch
from depthprune_runtime.model.linear import Linear
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.spec import AttentionSpec, FFNSpec, SublayerSpec
from depthprune_runtime.weights.rows import Stored, as_weight


def plain(stored: Stored) -> Tensor:
    """A tensor that is no weight of a projection: norms and biases."""
    assert isinstance(stored, Tensor)
    return stored


def linear(tensors: Mapping[str, Stored], name: str) -> Linear:
    bias = tensors.get(f"{name}.bias")
    return Linear(as_weight(tensors[f"{name}.weight"]), None if bias is None else plain(bias))


KVPair = tuple[Tensor, Tensor]  # k_cache, v_cache: [N, P, K, D] each


def normalised(
    residual: Tensor,  # [T, C]
    weight: Tensor,  # [C]
    eps: float,
    out: Tensor | None = None,  # [T, C]: is added to `residual` first, in place
) -> Tensor:  # [T, C]
    """RMSNorm of the residual stream, in the dtype of `weight`; a wider stream is rounded after the norm only."""
    gain = weight.to(residual.dtype)
    if out is None:
        return ops.rms_norm(residual, gain, eps).to(weight.dtype)
    return ops.add_rms_norm(out, residual, gain, eps).to(weight.dtype)


class _Residual(ABC):
    """What both sub-layers do alike."""

    norm: Tensor | None  # [C]
    post_norm: Tensor | None  # [C]
    dtype: torch.dtype
    eps: float

    def _set_norms(self, tensors: Mapping[str, Stored]) -> None:
        norms = [plain(tensors[name]) if name in tensors else None for name in ("norm.weight", "post_norm.weight")]
        self.norm, self.post_norm = norms
        self.dtype = next(norm.dtype for norm in norms if norm is not None)

    def enter(self, residual: Tensor, out: Tensor | None = None) -> Tensor:  # [T, C] -> [T, C]
        """What `inner` takes. out: of the sub-layer before, is added to the residual stream first, in place."""
        if self.norm is not None:
            return normalised(residual, self.norm, self.eps, out)
        if out is not None:
            residual.add_(out)
        return residual.to(self.dtype)  # a norm comes after the projection only

    @abstractmethod
    def inner(
        self,
        hidden: Tensor,  # [T, C]
        batch: Batch,
        kv: KVPair | None = None,
        select: Tensor | None = None,  # [R] int64: tokens to return, all by default; all keys and values are written
    ) -> Tensor:  # [T or R, width]
        """Inner activations, what `project` takes."""

    @abstractmethod
    def project(self, inner: Tensor) -> Tensor:  # [T, width] -> [T, C]
        """The output projection."""

    def leave(self, out: Tensor) -> Tensor:  # [T, C] -> [T, C]
        """What is added to the residual stream, from the projection's output."""
        return out if self.post_norm is None else ops.rms_norm(out, self.post_norm, self.eps)

    def __call__(
        self,
        residual: Tensor,  # [T, C]
        batch: Batch,
        kv: KVPair | None = None,
        out: Tensor | None = None,  # [T, C], see `enter`
        select: Tensor | None = None,  # [R] int64, see `inner`
    ) -> Tensor:  # [T or R, C]
        """What the sub-layer adds to the residual stream."""
        return self.leave(self.project(self.inner(self.enter(residual, out), batch, kv, select)))


class Attention(_Residual):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, spec: AttentionSpec, tensors: Mapping[str, Stored], eps: float, rotary: RotaryTable) -> None:
        self.spec = spec
        self._set_norms(tensors)
        self.qkv = linear(tensors, "qkv_proj")  # [(H + 2K) D, C]
        self.q_norm = plain(tensors["q_norm.weight"]) if spec.qk_norm else None  # [H, D]
        self.k_norm = plain(tensors["k_norm.weight"]) if spec.qk_norm else None  # [K, D]
        self.o = linear(tensors, "o_proj")  # [C, H D]
        self.rotary = rotary
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        self.softcap = spec.softcap or 0.0
        self.norms_all_heads = spec.qk_norm and spec.qk_norm_over == "all"
        self.window = spec.sliding_window or 0
        self.eps = eps

    @property
    def output_weight(self) -> Tensor:  # [C, H D]
        return self.o.weight.dense()

    @property
    def output_bias(self) -> Tensor | None:  # [C]
        return self.o.bias

    def inner(
        self,
        hidden: Tensor,  # [T, C]
        batch: Batch,
        kv: KVPair | None = None,
        select: Tensor | None = None,  # [R] int64
    ) -> Tensor:  # [T or R, H D]
        spec = self.spec
        qkv = self.qkv(hidden)
        heads = qkv.view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        q_norm, k_norm = self.q_norm, self.k_norm
        if self.norms_all_heads and q_norm is not None and k_norm is not None:
            self._norm_all_(q, q_norm)
            self._norm_all_(k, k_norm)
            q_norm = k_norm = None
        table = self.rotary.rows(batch.max_position + 1)
        paged = batch.paged
        if paged is not None and kv is not None:
            ops.rotary_kv_write(q, k, v, q_norm, k_norm, self.eps, table, batch.positions, *kv, paged.slot_mapping)
        else:
            if q_norm is not None and k_norm is not None:
                ops.head_rms_norm(q, q_norm, self.eps)
                ops.head_rms_norm(k, k_norm, self.eps)
            ops.rotary(q, k, table, batch.positions)
        bounds = batch.cu_seqlens
        # A query alone reads its whole context again: worth it for no more than one a request.
        few = paged is not None and kv is not None and select is not None and select.shape[0] < bounds.shape[0]
        if few and select is not None:
            q = q[select]
            bounds, paged = batch.alone(select)
        if paged is None or kv is None or paged.fresh:
            out = ops.varlen_attention(q, k, v, bounds, self.scale, self.window, self.softcap)
        else:
            tables, contexts = paged.block_tables, paged.context_lens
            out = ops.paged_attention(q, *kv, tables, contexts, bounds, self.scale, self.window, self.softcap)
        if select is not None and not few:
            out = out[select]
        return out.reshape(-1, spec.q_size)

    def _norm_all_(self, heads: Tensor, gains: Tensor) -> None:  # [T, H, D], [H, D]
        """RMSNorm over all heads at once, in place."""
        heads.copy_(ops.rms_norm(heads.flatten(1), gains.flatten(), self.eps).view_as(heads))

    def project(self, inner: Tensor) -> Tensor:  # [T, H D] -> [T, C]
        return self.o(inner)


class FFN(_Residual):
    """Gated FFN."""

    def __init__(self, spec: FFNSpec, tensors: Mapping[str, Stored], eps: float) -> None:
        self.spec = spec
        self._set_norms(tensors)
        self.gate_up = linear(tensors, "gate_up_proj")  # [2F, C], gate rows first
        self.down = linear(tensors, "down_proj")  # [C, F]
        self.eps = eps

    @property
    def output_weight(self) -> Tensor:  # [C, F]
        return self.down.weight.dense()

    @property
    def output_bias(self) -> Tensor | None:  # [C]
        return self.down.bias

    def inner(
        self,
        hidden: Tensor,  # [T, C]
        batch: Batch,
        kv: KVPair | None = None,
        select: Tensor | None = None,  # [R] int64
    ) -> Tensor:  # [T or R, F]
        if select is not None:
            hidden = hidden[select]
        return self.gate_up.gated(hidden, self.spec.activation)

    def project(self, inner: Tensor) -> Tensor:  # [T, F] -> [T, C]
        return self.down(inner)


Sublayer = Attention | FFN


def build_sublayer(
    spec: SublayerSpec, tensors: Mapping[str, Stored], eps: float, rotary: RotaryTable | None
) -> Sublayer:
    """Sub-layer over `tensors` (short names, see `tensor_shapes`); attention needs its rotary table."""
    if isinstance(spec, FFNSpec):
        return FFN(spec, tensors, eps)
    assert rotary is not None
    return Attention(spec, tensors, eps, rotary)
