"""`Decoder`: any `DecoderSpec` over its tensors, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from depthprune_runtime.model.batch import Batch
from depthprune_runtime.model.linear import Linear
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.model.sublayers import Attention, KVPair, Sublayer, build_sublayer, normalised, plain
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, RopeSpec
from depthprune_runtime.weights.rows import Stored, as_weight
from depthprune_runtime.weights.weight import Weight

WeightGetter = Callable[[str], Stored]


def embedded(table: Weight, ids: Tensor, dtype: torch.dtype, scale: float) -> Tensor:  # [T] int64 -> [T, C]
    """The residual stream that enters the first sub-layer."""
    rows = table.rows(ids, dtype)
    # the scale is rounded first, as where these models were trained
    return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=dtype, device=rows.device)


class SublayerLoader:
    """Builds single sub-layers from a tensor source, sharing rotary tables; one at a time or all at once."""

    def __init__(self, spec: DecoderSpec, weight: WeightGetter, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self._weight = weight
        self._rotary: dict[tuple[RopeSpec | None, int], RotaryTable] = {}

    def _stored(self, name: str) -> Stored:
        return self._weight(name).to(self.device, self.dtype)

    def weight(self, name: str) -> Weight:
        """Weight `name` on the device, rows in the compute dtype; no copy where it already is."""
        return as_weight(self._stored(name))

    def tensor(self, name: str) -> Tensor:
        """A norm or a bias."""
        return plain(self._stored(name))

    def sublayer(self, index: int) -> Sublayer:
        spec = self.spec.sublayers[index]
        prefix = f"sublayers.{index}."
        tensors = {name.removeprefix(prefix): self._stored(name) for name in self.spec.sublayer_shapes(index)}
        rotary = None
        if isinstance(spec, AttentionSpec):
            rope = (spec.rope or self.spec.rope) if spec.use_rope else None
            key = (rope, spec.head_dim)
            rotary = self._rotary.get(key)
            if rotary is None:
                rotary = self._rotary[key] = RotaryTable(rope, spec.head_dim, self.device)
        return build_sublayer(spec, tensors, self.spec.rms_norm_eps, rotary)


class Decoder:
    """The whole model in memory.

    spec: the architecture; weight: name -> weight; device, dtype: where and in what it computes.
    """

    def __init__(self, spec: DecoderSpec, weight: WeightGetter, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        loader = SublayerLoader(spec, weight, device, dtype)
        self.embed_tokens = loader.weight("embed_tokens.weight")  # [V, C]
        self.sublayers = [loader.sublayer(i) for i in range(len(spec.sublayers))]
        self.norm = loader.tensor("norm.weight")  # [C]
        head = self.embed_tokens if spec.tie_word_embeddings else loader.weight("lm_head.weight")
        self.lm_head = Linear(head)  # [V, C]
        attention = [i for i, sublayer in enumerate(self.sublayers) if isinstance(sublayer, Attention)]
        self._last_attention = attention[-1] if attention else -1

    @property
    def rounds_inputs(self) -> bool:
        """Whether no weight forbids that its inputs are rounded to 8 bits."""
        projections = [self.lm_head]
        for sublayer in self.sublayers:
            own = (sublayer.qkv, sublayer.o) if isinstance(sublayer, Attention) else (sublayer.gate_up, sublayer.down)
            projections.extend(own)
        return all(projection.weight.rounds_inputs for projection in projections)

    def embed(self, ids: Tensor) -> Tensor:  # [T] int64 -> [T, C]
        """The residual stream that enters the first sub-layer."""
        return embedded(self.embed_tokens, ids, self.dtype, self.spec.embedding_scale)

    def final(self, residual: Tensor, out: Tensor | None = None) -> Tensor:  # [T, C] -> [T, C]
        """The last norm, what `logits` takes. out: of the last sub-layer, is added to `residual` first, in place."""
        return normalised(residual, self.norm, self.spec.rms_norm_eps, out)

    def hidden_states(
        self,
        ids: Tensor,  # [T] int64
        batch: Batch,
        kv: Sequence[KVPair | None] | None = None,  # one entry a sub-layer, None for FFN
        select: Tensor | None = None,  # [R] int64: tokens to return; all by default
    ) -> Tensor:  # [T or R, C]
        """Final hidden states, after the last norm; new keys and values are written to `kv`.

        From the last attention's queries on, only the tokens of `select` are computed: no other token sees more of
        them than their keys and values.
        """
        few = select if select is not None and select.shape[0] < ids.shape[0] else None
        if few is not None and self._last_attention < 0:
            ids = ids[few]
        residual = self.embed(ids)
        out: Tensor | None = None
        for i, sublayer in enumerate(self.sublayers):
            here = few if i == self._last_attention else None
            out = sublayer(residual, batch, kv[i] if kv is not None else None, out, here)
            if here is not None:
                residual = residual[here]
        if select is not None and few is None:
            residual = residual[select]
            out = out[select] if out is not None else None
        return self.final(residual, out)

    def logits(self, hidden: Tensor) -> Tensor:  # [T, C] -> [T, V]
        logits = self.lm_head(hidden)
        cap = self.spec.logit_softcap
        return logits if cap is None else (logits.float() / cap).tanh_().mul_(cap).to(logits.dtype)
