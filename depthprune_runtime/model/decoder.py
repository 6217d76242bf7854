"""`Decoder`: any `DecoderSpec` over its tensors, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from depthprune_runtime import ops
from depthprune_runtime.model.batch import Batch
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.model.sublayers import KVPair, Sublayer, build_sublayer
from depthprune_runtime.spec import AttentionSpec, DecoderSpec

TensorGetter = Callable[[str], Tensor]


class SublayerLoader:
    """Builds single sub-layers from a tensor source, sharing rotary tables; one at a time or all at once."""

    def __init__(self, spec: DecoderSpec, tensor: TensorGetter, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self._tensor = tensor
        self._rotary: dict[int, RotaryTable] = {}

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` on the device in the compute dtype; no copy where it already is."""
        return self._tensor(name).to(device=self.device, dtype=self.dtype)

    def sublayer(self, index: int) -> Sublayer:
        spec = self.spec.sublayers[index]
        prefix = f"sublayers.{index}."
        tensors = {name.removeprefix(prefix): self.tensor(name) for name in self.spec.sublayer_shapes(index)}
        rotary = None
        if isinstance(spec, AttentionSpec):
            rotary = self._rotary.get(spec.head_dim)
            if rotary is None:
                rotary = self._rotary[spec.head_dim] = RotaryTable(self.spec.rope, spec.head_dim, self.device)
        return build_sublayer(spec, tensors, self.spec.rms_norm_eps, rotary)


class Decoder:
    """The whole model in memory.

    spec: the architecture; tensor: name -> tensor; device, dtype: where and in what it computes.
    """

    def __init__(self, spec: DecoderSpec, tensor: TensorGetter, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        loader = SublayerLoader(spec, tensor, device, dtype)
        self.embed_tokens = loader.tensor("embed_tokens.weight")  # [V, C]
        self.sublayers = [loader.sublayer(i) for i in range(len(spec.sublayers))]
        self.norm = loader.tensor("norm.weight")  # [C]
        self.lm_head = self.embed_tokens if spec.tie_word_embeddings else loader.tensor("lm_head.weight")  # [V, C]

    def hidden_states(
        self,
        ids: Tensor,  # [T] int64
        batch: Batch,
        kv: Sequence[KVPair | None] | None = None,  # one entry a sub-layer, None for FFN
        select: Tensor | None = None,  # [R] int64: tokens to return; all by default
    ) -> Tensor:  # [T or R, C]
        """Final hidden states, after the last norm; new keys and values are written to `kv`."""
        eps = self.spec.rms_norm_eps
        residual = embedding(ids, self.embed_tokens)
        out: Tensor | None = None
        for i, sublayer in enumerate(self.sublayers):
            if out is None:
                hidden = ops.rms_norm(residual, sublayer.norm, eps)
            else:
                hidden = ops.add_rms_norm(out, residual, sublayer.norm, eps)
            out = sublayer(hidden, batch, kv[i] if kv is not None else None)
        if select is not None:
            residual = residual[select]
            out = out[select] if out is not None else None
        if out is None:
            return ops.rms_norm(residual, self.norm, eps)
        return ops.add_rms_norm(out, residual, self.norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:  # [T, C] -> [T, V]
        return ops.linear(hidden, self.lm_head)
