"""The two kinds of residual sub-layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.fields import from_fields
from depthprune_runtime.spec.checks import later, require, require_bool, require_int, require_number, require_origin
from depthprune_runtime.spec.rope import RopeSpec

Shape = tuple[int, ...]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class AttentionSpec:
    """One attention sub-layer. Query heads of one KV group are contiguous (Hugging Face order).

    `qk_norm`: RMSNorm of queries and keys, over head_dim of every head or, `qk_norm_over` all, over all heads at once;
    gains are kept per head, so that blocks with different gains can be merged. `origin`: the blocks of the dense
    parent it came from. `pre_norm`, `post_norm`: RMSNorm of the residual before the projections, and of what is added
    to it. `use_rope`: false where positions are not told; `rope`: None is the decoder's. `scale`: of the scores, None
    is head_dim ** -0.5. `softcap`: scores become `softcap * tanh(score / softcap)`.
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
    pre_norm: bool = later(True)
    post_norm: bool = later(False)
    qk_norm_over: Literal["head", "all"] = later("head")
    use_rope: bool = later(True)
    rope: RopeSpec | None = later(None)
    scale: float | None = later(None)
    softcap: float | None = later(None)

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            require_int("attention", name, getattr(self, name), 1)
        for name in ("qkv_bias", "o_bias", "qk_norm", "pre_norm", "post_norm", "use_rope"):
            require_bool("attention", name, getattr(self, name))
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"attention.num_heads: expected a multiple of num_kv_heads {self.num_kv_heads}, got {self.num_heads}",
        )
        require(self.head_dim % 2 == 0, f"attention.head_dim: expected an even number, got {self.head_dim}")
        if self.sliding_window is not None:
            require_int("attention", "sliding_window", self.sliding_window, 1)
        over = ("head", "all")
        require(
            self.qk_norm_over in over,
            f"attention.qk_norm_over: expected one of {over}, got {printable(repr(self.qk_norm_over))}",
        )
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None:
                require_number("attention", name, getattr(self, name))
        if self.rope is not None:
            self.rope.check_head_dim(self.head_dim)
        _require_a_norm("attention", self)
        require_origin("attention", self.origin)

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
    """One gated FFN sub-layer: `down(act(gate(x)) * up(x))`. `pre_norm`, `post_norm`: see `AttentionSpec`."""

    kind: ClassVar[Literal["ffn"]] = "ffn"

    intermediate_size: int
    origin: tuple[int, ...]
    activation: Activation = "silu"
    down_bias: bool = False
    pre_norm: bool = later(True)
    post_norm: bool = later(False)

    def __post_init__(self) -> None:
        require_int("ffn", "intermediate_size", self.intermediate_size, 1)
        for name in ("down_bias", "pre_norm", "post_norm"):
            require_bool("ffn", name, getattr(self, name))
        known = get_args(Activation)
        require(
            self.activation in known,
            f"ffn.activation: expected one of {known}, got {printable(repr(self.activation))}",
        )
        _require_a_norm("ffn", self)
        require_origin("ffn", self.origin)

    def tensor_shapes(self, hidden_size: int) -> dict[str, Shape]:
        """Tensors of this sub-layer without its norm, short name -> shape."""
        shapes: dict[str, Shape] = {
            "gate_up_proj.weight": (2 * self.intermediate_size, hidden_size),
            "down_proj.weight": (hidden_size, self.intermediate_size),
        }
        if self.down_bias:
            shapes["down_proj.bias"] = (hidden_size,)
        return shapes


def _require_a_norm(owner: str, spec: AttentionSpec | FFNSpec) -> None:
    require(spec.pre_norm or spec.post_norm, f"{owner}: expected pre_norm, post_norm or both")


SublayerSpec = AttentionSpec | FFNSpec
_SUBLAYER_TYPES: dict[str, type[AttentionSpec] | type[FFNSpec]] = {"attention": AttentionSpec, "ffn": FFNSpec}


def sublayer_from_json(data: object, what: str) -> SublayerSpec:
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(kind, str) or kind not in _SUBLAYER_TYPES:
        raise InputError(f"{what}: expected an object with kind 'attention' or 'ffn', got kind {printable(repr(kind))}")
    return from_fields(_SUBLAYER_TYPES[kind], {k: v for k, v in data.items() if k != "kind"}, what)
