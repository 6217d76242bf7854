"""`DecoderSpec`: the one language between pruning, checkpoint, runtime and export.

A decoder is a sequence of residual sub-layers, each with its own width::

    x = x + f_i(rms_norm_i(x))          i = 0 .. len(sublayers) - 1
    logits = lm_head(rms_norm(x))

Everything that depends on a width (tensor names, shapes, parameter counts, bytes) is derived here and
written nowhere else. Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.fields import from_fields

Shape = tuple[int, ...]
_MAX_INT = (1 << 63) - 1
_MAX_FLOAT = 3.4028234663852886e38  # of float32, which positions and norms are computed in
RopeKind = Literal["default", "linear", "llama3", "factors"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _require_int(owner: str, name: str, value: object, minimum: int) -> None:
    # no kernel counts further, and Python does not print every integer
    _require(
        not isinstance(value, int) or abs(value) < 2**31,
        f"{owner}.{name}: expected an integer below 2**31, got a larger one",
    )
    good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    _require(good, f"{owner}.{name}: expected an integer >= {minimum}, got {value!r}")


def _require_bool(owner: str, name: str, value: object) -> None:
    _require(isinstance(value, bool), f"{owner}.{name}: expected true or false, got {value!r}")


def _require_origin(owner: str, origin: tuple[int, ...]) -> None:
    _require(len(origin) > 0, f"{owner}.origin: expected at least one block of the dense parent")
    for block in origin:
        _require_int(owner, "origin", block, 0)


def _require_number(owner: str, name: str, value: object) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    good = good and 0 < value <= (_MAX_INT if isinstance(value, int) else _MAX_FLOAT)  # type: ignore[operator]
    shown = "a larger integer" if isinstance(value, int) and abs(value) > _MAX_INT else printable(repr(value))
    _require(good, f"{owner}.{name}: expected a positive number that float32 holds, got {shown}")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: frequencies `theta ** (-2 i / head_dim)`, optionally rescaled.

    kind: `default`, `linear` (all divided by `factor`), `llama3` (Llama 3.1's wavelength-dependent
    division), `factors` (one divisor a frequency, as GGUF files store them).
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        kinds = ("default", "linear", "llama3", "factors")
        _require(self.kind in kinds, f"rope.kind: expected one of {kinds}, got {self.kind!r}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            _require_number("rope", name, getattr(self, name))
        _require_int("rope", "original_max_position_embeddings", self.original_max_position_embeddings, 1)
        for value in self.factors:
            _require_number("rope", "factors", value)
        if self.kind == "llama3":
            _require(
                self.high_freq_factor > self.low_freq_factor,
                f"rope: expected high_freq_factor > low_freq_factor, got {self.high_freq_factor} "
                f"and {self.low_freq_factor}",
            )
        _require(
            (self.kind == "factors") == bool(self.factors),
            f"rope.factors: kind {self.kind!r} with {len(self.factors)} factors",
        )


@dataclass(frozen=True)
class AttentionSpec:
    """One attention sub-layer. Query heads of one KV group are contiguous (Hugging Face order).

    `qk_norm`: RMSNorm over head_dim of every query and key head; gains are kept per head, so that
    blocks with different gains can be merged. `origin`: the blocks of the dense parent it came from.
    """

    kind: ClassVar[Literal["attention"]] = "attention"

    num_heads: int
    num_kv_heads: int
    head_dim: int
    origin: tuple[int, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            _require_int("attention", name, getattr(self, name), 1)
        for name in ("qkv_bias", "o_bias", "qk_norm"):
            _require_bool("attention", name, getattr(self, name))
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"attention.num_heads: expected a multiple of num_kv_heads {self.num_kv_heads}, got {self.num_heads}",
        )
        _require(self.head_dim % 2 == 0, f"attention.head_dim: expected an even number, got {self.head_dim}")
        if self.sliding_window is not None:
            _require_int("attention", "sliding_window", self.sliding_window, 1)
        _require_origin("attention", self.origin)

    @property
    def q_size(self) -> int:
        """Width of all query heads, H * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or all value) heads, K * D."""
        return self.num_kv_heads * self.head_dim

    def tensor_shapes(self, hidden_size: int) -> dict[str, Shape]:
        """Tensors of this sub-layer without its norm, short name -> shape."""
        qkv = self.q_size + 2 * self.kv_size
        shapes: dict[str, Shape] = {"qkv_proj.weight": (qkv, hidden_size)}
        if self.qkv_bias:
            shapes["qkv_proj.bias"] = (qkv,)
        if self.qk_norm:
            shapes["q_norm.weight"] = (self.num_heads, self.head_dim)
            shapes["k_norm.weight"] = (self.num_kv_heads, self.head_dim)
        shapes["o_proj.weight"] = (hidden_size, self.q_size)
        if self.o_bias:
            shapes["o_proj.bias"] = (hidden_size,)
        return shapes


@dataclass(frozen=True)
class FFNSpec:
    """One gated FFN sub-layer: `down(act(gate(x)) * up(x))`."""

    kind: ClassVar[Literal["ffn"]] = "ffn"

    intermediate_size: int
    origin: tuple[int, ...]
    activation: Literal["silu"] = "silu"
    down_bias: bool = False

    def __post_init__(self) -> None:
        _require_int("ffn", "intermediate_size", self.intermediate_size, 1)
        _require_bool("ffn", "down_bias", self.down_bias)
        _require(self.activation == "silu", f"ffn.activation: expected 'silu', got {self.activation!r}")
        _require_origin("ffn", self.origin)

    def tensor_shapes(self, hidden_size: int) -> dict[str, Shape]:
        """Tensors of this sub-layer without its norm, short name -> shape."""
        shapes: dict[str, Shape] = {
            "gate_up_proj.weight": (2 * self.intermediate_size, hidden_size),
            "down_proj.weight": (hidden_size, self.intermediate_size),
        }
        if self.down_bias:
            shapes["down_proj.bias"] = (hidden_size,)
        return shapes


SublayerSpec = AttentionSpec | FFNSpec
_SUBLAYER_TYPES: dict[str, type[AttentionSpec] | type[FFNSpec]] = {"attention": AttentionSpec, "ffn": FFNSpec}


def _sublayer_from_json(data: object, what: str) -> SublayerSpec:
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(kind, str) or kind not in _SUBLAYER_TYPES:
        raise InputError(f"{what}: expected an object with kind 'attention' or 'ffn', got kind {printable(repr(kind))}")
    return from_fields(_SUBLAYER_TYPES[kind], {k: v for k, v in data.items() if k != "kind"}, what)


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder. `vocab_size` counts rows of the embedding, which may exceed the tokenizer's."""

    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    sublayers: tuple[SublayerSpec, ...]

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "max_position_embeddings"):
            _require_int("spec", name, getattr(self, name), 1)
        _require_number("spec", "rms_norm_eps", self.rms_norm_eps)
        _require_bool("spec", "tie_word_embeddings", self.tie_word_embeddings)
        if self.rope.kind == "factors":
            for sub in self.attention_sublayers():
                _require(
                    sub.head_dim == 2 * len(self.rope.factors),
                    f"rope.factors: expected {sub.head_dim // 2} of them, got {len(self.rope.factors)}",
                )

    def attention_sublayers(self) -> tuple[AttentionSpec, ...]:
        return tuple(s for s in self.sublayers if isinstance(s, AttentionSpec))

    def ffn_sublayers(self) -> tuple[FFNSpec, ...]:
        return tuple(s for s in self.sublayers if isinstance(s, FFNSpec))

    def sublayer_shapes(self, index: int) -> dict[str, Shape]:
        """Full tensor name -> shape for sub-layer `index`, its norm first."""
        prefix = f"sublayers.{index}."
        shapes: dict[str, Shape] = {prefix + "norm.weight": (self.hidden_size,)}
        shapes.update({prefix + k: v for k, v in self.sublayers[index].tensor_shapes(self.hidden_size).items()})
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

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["sublayers"] = [{"kind": s.kind, **dataclasses.asdict(s)} for s in self.sublayers]
        return data

    @classmethod
    def from_json(cls, data: object) -> DecoderSpec:
        if not isinstance(data, dict):
            raise InputError(f"spec: expected a JSON object, got {type(data).__name__}")
        sublayers = data.get("sublayers")
        if not isinstance(sublayers, list):
            raise InputError(f"spec.sublayers: expected a list, got {type(sublayers).__name__}")
        parsed = [_sublayer_from_json(s, f"spec.sublayers[{i}]") for i, s in enumerate(sublayers)]
        rope = from_fields(RopeSpec, data.get("rope"), "spec.rope")
        return from_fields(cls, {**data, "sublayers": tuple(parsed), "rope": rope}, "spec")
