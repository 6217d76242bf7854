"""`DecoderSpec`: the one language between pruning, checkpoint, runtime and export.

A decoder is a sequence of residual sub-layers, each with its own width::

    x = x + f_i(rms_norm_i(x))          i = 0 .. len(sublayers) - 1
    logits = lm_head(rms_norm(x))

A sub-layer may have a norm after f_i as well, or only there.

Everything that depends on a width (tensor names, shapes, parameter counts, bytes) is derived here and
written nowhere else. Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from depthprune_runtime.errors import InputError
from depthprune_runtime.fields import from_fields
from depthprune_runtime.spec.checks import changed, later, require_bool, require_int, require_number, to_fields
from depthprune_runtime.spec.rope import RopeSpec
from depthprune_runtime.spec.sublayers import AttentionSpec, FFNSpec, Shape, SublayerSpec, sublayer_from_json


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder. `vocab_size` counts rows of the embedding, which may exceed the tokenizer's.

    `embedding_scale`: embeddings are multiplied by it. `logit_softcap`: logits become `c * tanh(logit / c)`.
    """

    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    sublayers: tuple[SublayerSpec, ...]
    embedding_scale: float = later(1.0)
    logit_softcap: float | None = later(None)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "max_position_embeddings"):
            require_int("spec", name, getattr(self, name), 1)
        require_number("spec", "rms_norm_eps", self.rms_norm_eps)
        require_bool("spec", "tie_word_embeddings", self.tie_word_embeddings)
        require_number("spec", "embedding_scale", self.embedding_scale)
        if self.logit_softcap is not None:
            require_number("spec", "logit_softcap", self.logit_softcap)
        for sub in self.attention_sublayers():
            if sub.rope is None:
                self.rope.check_head_dim(sub.head_dim)

    def attention_sublayers(self) -> tuple[AttentionSpec, ...]:
        return tuple(s for s in self.sublayers if isinstance(s, AttentionSpec))

    def ffn_sublayers(self) -> tuple[FFNSpec, ...]:
        return tuple(s for s in self.sublayers if isinstance(s, FFNSpec))

    def sublayer_shapes(self, index: int) -> dict[str, Shape]:
        """Full tensor name -> shape for sub-layer `index`, in the order in which they apply."""
        prefix = f"sublayers.{index}."
        sublayer = self.sublayers[index]
        shapes: dict[str, Shape] = {}
        if sublayer.pre_norm:
            shapes[prefix + "norm.weight"] = (self.hidden_size,)
        shapes.update({prefix + k: v for k, v in sublayer.tensor_shapes(self.hidden_size).items()})
        if sublayer.post_norm:
            shapes[prefix + "post_norm.weight"] = (self.hidden_size,)
        return shapes

    def tensor_shapes(self) -> dict[str, Shape]:
        """Every tensor of the checkpoint, name -> shape, in the order in which decoding reads them."""
        shapes: dict[str, Shape] = {"embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for i in range(len(self.sublayers)):
            shapes.update(self.sublayer_shapes(i))
        shapes["norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def ends_in_norms(self) -> bool:
        """Whether a sub-layer has a norm after its output projection: none of those is solved anew."""
        return any(sublayer.post_norm for sublayer in self.sublayers)

    @property
    def head_name(self) -> str:
        """The tensor that turns hidden states into logits."""
        return "embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"

    def projections(self) -> dict[str, Shape]:
        """The matrices that a token's hidden state is multiplied by, the head last, name -> [out, in]."""
        shapes = self.tensor_shapes()
        inner = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
        return {**inner, self.head_name: shapes[self.head_name]}

    def num_parameters(self, embeddings: bool = True) -> int:
        """All parameters; `embeddings=False` leaves out embed_tokens and lm_head."""
        return sum(
            math.prod(shape)
            for name, shape in self.tensor_shapes().items()
            if embeddings or name not in ("embed_tokens.weight", "lm_head.weight")
        )

    def sublayer_parameters(self, index: int) -> int:
        return sum(math.prod(shape) for shape in self.sublayer_shapes(index).values())

    def parameters_per_token(self) -> int:
        """Parameters that decoding one token reads: all but the rows of the input embedding."""
        head = self.vocab_size * self.hidden_size
        return self.num_parameters(embeddings=False) + head

    def bytes_per_token(self, element_size: int) -> int:
        """Weight bytes that one decode step at batch 1 reads (the KV cache comes on top)."""
        return self.parameters_per_token() * element_size

    def kv_bytes_per_token(self, element_size: int) -> int:
        """KV cache bytes that one token of context takes; a dropped attention takes none."""
        return sum(2 * s.kv_size for s in self.attention_sublayers()) * element_size

    def whole_blocks(self) -> tuple[tuple[int, int], ...] | None:
        """(attention, FFN) sub-layer indices block by block; None where a block has lost a sub-layer."""
        pairs = tuple((i, i + 1) for i, s in enumerate(self.sublayers) if s.kind == "attention")
        inside = [i for pair in pairs for i in pair]  # two attentions in a row are in it twice
        return pairs if inside == list(range(len(self.sublayers))) else None

    def uniform(self) -> tuple[int, AttentionSpec, FFNSpec] | None:
        """(number of blocks, attention, FFN) if a stock Hugging Face config can express it, else None."""
        blocks = self.whole_blocks()
        if not blocks:
            return None
        attention = {dataclasses.replace(s, origin=(0,)) for s in self.attention_sublayers()}
        ffn = {dataclasses.replace(s, origin=(0,)) for s in self.ffn_sublayers()}
        if len(attention) != 1 or len(ffn) != 1:
            return None
        return len(blocks), attention.pop(), ffn.pop()

    def beyond_llama(self) -> frozenset[str]:
        """What sets this decoder apart from pre-norm, SwiGLU and one rope, such as `attention.softcap`.

        Whoever handles a part of it only, an export or a fused step, compares this with what it handles.
        """
        found = {f"spec.{name}" for name in changed(self)}
        ropes = {self.rope, *(s.rope for s in self.attention_sublayers() if s.rope is not None)}
        found |= {f"rope.{name}" for rope in ropes for name in changed(rope)}
        for sublayer in self.sublayers:
            found |= {f"{sublayer.kind}.{name}" for name in changed(sublayer)}
            if isinstance(sublayer, FFNSpec) and sublayer.activation != "silu":
                found.add("ffn.activation")
        return frozenset(found)

    def to_json(self) -> dict[str, Any]:
        data = to_fields(self)
        data["sublayers"] = [{"kind": s.kind, **to_fields(s)} for s in self.sublayers]
        return data

    @classmethod
    def from_json(cls, data: object) -> DecoderSpec:
        if not isinstance(data, dict):
            raise InputError(f"spec: expected a JSON object, got {type(data).__name__}")
        sublayers = data.get("sublayers")
        if not isinstance(sublayers, list):
            raise InputError(f"spec.sublayers: expected a list, got {type(sublayers).__name__}")
        parsed = [sublayer_from_json(s, f"spec.sublayers[{i}]") for i, s in enumerate(sublayers)]
        rope = from_fields(RopeSpec, data.get("rope"), "spec.rope")
        return from_fields(cls, {**data, "sublayers": tuple(parsed), "rope": rope}, "spec")
