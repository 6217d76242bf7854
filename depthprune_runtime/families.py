"""One table per source family: config keys and tensor-name templates.

`config` is always a complete Hugging Face config dictionary (defaults filled in). Packed tensors are
described as rows of source tensors, so that importing, digesting and streaming share one description.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec, Shape

Config = Mapping[str, Any]

_MAX_SIZE = (1 << 31) - 1  # of a dimension or a context: what an int32 holds
_MAX_THETA = 1e18


def _layer_windows(config: Config) -> list[int | None]:
    """Sliding window of each block; Qwen lists block types, Mistral gives one window for all."""
    count = config["num_hidden_layers"]
    window = config.get("sliding_window")
    types = config.get("layer_types")
    if types is None:
        return [window] * count
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list | tuple) or len(types) != count:
        raise InputError(f"config.layer_types: expected a list of {count}, one a block")
    for kind in types:
        if not isinstance(kind, str) or kind not in known:
            raise InputError(f"config.layer_types: expected {sorted(known)}, got {printable(repr(kind))}")
    return [known[kind] for kind in types]


def _no_windows(config: Config) -> list[int | None]:
    return [None] * config["num_hidden_layers"]


@dataclass(frozen=True)
class Family:
    """What sets one `model_type` apart from plain Llama."""

    qkv_bias: Callable[[Config], bool]
    o_bias: Callable[[Config], bool]
    qk_norm: bool
    windows: Callable[[Config], list[int | None]]


def _attention_bias(config: Config) -> bool:
    return bool(config.get("attention_bias", False))


FAMILIES: dict[str, Family] = {
    "llama": Family(_attention_bias, _attention_bias, False, _no_windows),
    "mistral": Family(lambda _: False, lambda _: False, False, _layer_windows),
    "qwen2": Family(lambda _: True, lambda _: False, False, _layer_windows),
    "qwen3": Family(_attention_bias, _attention_bias, True, _layer_windows),
}

# Source names by packed name; several names are concatenated along dimension 0.
_HF_BLOCK = "model.layers.{block}."
HF_NAMES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
    "attention.norm.weight": (_HF_BLOCK + "input_layernorm.weight",),
    "attention.qkv_proj.weight": tuple(_HF_BLOCK + f"self_attn.{x}_proj.weight" for x in "qkv"),
    "attention.qkv_proj.bias": tuple(_HF_BLOCK + f"self_attn.{x}_proj.bias" for x in "qkv"),
    "attention.q_norm.weight": (_HF_BLOCK + "self_attn.q_norm.weight",),
    "attention.k_norm.weight": (_HF_BLOCK + "self_attn.k_norm.weight",),
    "attention.o_proj.weight": (_HF_BLOCK + "self_attn.o_proj.weight",),
    "attention.o_proj.bias": (_HF_BLOCK + "self_attn.o_proj.bias",),
    "ffn.norm.weight": (_HF_BLOCK + "post_attention_layernorm.weight",),
    "ffn.gate_up_proj.weight": (_HF_BLOCK + "mlp.gate_proj.weight", _HF_BLOCK + "mlp.up_proj.weight"),
    "ffn.down_proj.weight": (_HF_BLOCK + "mlp.down_proj.weight",),
}
_GGUF_BLOCK = "blk.{block}."
GGUF_NAMES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("token_embd.weight",),
    "norm.weight": ("output_norm.weight",),
    "lm_head.weight": ("output.weight",),
    "attention.norm.weight": (_GGUF_BLOCK + "attn_norm.weight",),
    "attention.qkv_proj.weight": tuple(_GGUF_BLOCK + f"attn_{x}.weight" for x in "qkv"),
    "attention.qkv_proj.bias": tuple(_GGUF_BLOCK + f"attn_{x}.bias" for x in "qkv"),
    "attention.q_norm.weight": (_GGUF_BLOCK + "attn_q_norm.weight",),
    "attention.k_norm.weight": (_GGUF_BLOCK + "attn_k_norm.weight",),
    "attention.o_proj.weight": (_GGUF_BLOCK + "attn_output.weight",),
    "attention.o_proj.bias": (_GGUF_BLOCK + "attn_output.bias",),
    "ffn.norm.weight": (_GGUF_BLOCK + "ffn_norm.weight",),
    "ffn.gate_up_proj.weight": (_GGUF_BLOCK + "ffn_gate.weight", _GGUF_BLOCK + "ffn_up.weight"),
    "ffn.down_proj.weight": (_GGUF_BLOCK + "ffn_down.weight",),
    "ffn.down_proj.bias": (_GGUF_BLOCK + "ffn_down.bias",),
}


def source_names(table: Mapping[str, tuple[str, ...]], spec: DecoderSpec, name: str) -> tuple[str, ...]:
    """Names in the source of packed tensor `name` of a dense `spec`."""
    if not name.startswith("sublayers."):
        return table[name]
    _, index, short = name.split(".", 2)
    sublayer = spec.sublayers[int(index)]
    return tuple(n.format(block=sublayer.origin[0]) for n in table[f"{sublayer.kind}.{short}"])


def source_shapes(table: Mapping[str, tuple[str, ...]], spec: DecoderSpec) -> dict[str, dict[str, Shape]]:
    """Packed name -> name in the source -> shape there, for every tensor of a dense `spec`."""
    found: dict[str, dict[str, Shape]] = {}
    for name, (rows, *rest) in spec.tensor_shapes().items():
        sources = source_names(table, spec, name)
        shapes: list[Shape] = [(rows // len(sources), *rest)] * len(sources)
        if name.startswith("sublayers."):
            sublayer = spec.sublayers[int(name.split(".", 2)[1])]
            if isinstance(sublayer, AttentionSpec):
                if ".qkv_proj." in name:
                    shapes = [(width, *rest) for width in (sublayer.q_size, sublayer.kv_size, sublayer.kv_size)]
                elif name.endswith(("q_norm.weight", "k_norm.weight")):
                    shapes = [(sublayer.head_dim,)]  # one gain for all heads
        found[name] = dict(zip(sources, shapes, strict=True))
    return found


def rope_from_config(config: Config) -> RopeSpec:
    """Rotary positions from `rope_parameters`, or from the older `rope_scaling` and `rope_theta`."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"config.rope_parameters: expected an object, got {type(parameters).__name__}")
    theta = parameters.get("rope_theta", config.get("rope_theta")) or 10000.0
    if not isinstance(theta, int | float) or not 1 <= theta <= _MAX_THETA:
        raise InputError(f"config.rope_theta: expected a number from 1 to {_MAX_THETA:g}, got {printable(repr(theta))}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1.0):
        raise InputError("config.partial_rotary_factor: expected 1.0 (whole heads rotated)")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=parameters["factor"])
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            kind="llama3",
            factor=parameters["factor"],
            low_freq_factor=parameters["low_freq_factor"],
            high_freq_factor=parameters["high_freq_factor"],
            original_max_position_embeddings=parameters["original_max_position_embeddings"],
        )
    if kind == "factors":
        return RopeSpec(theta=theta, kind="factors", factors=tuple(parameters["factors"]))
    if kind == "longrope":
        return _longrope(theta, parameters)
    raise InputError(
        f"config.rope_parameters: expected rope_type default, linear or llama3, got {printable(repr(kind))}"
    )


def _longrope(theta: float, parameters: Config) -> RopeSpec:
    """One divisor a frequency, if short and long contexts have the same ones and attention is not scaled."""
    factors = parameters.get("long_factor")
    if not isinstance(factors, list) or parameters.get("short_factor") != factors:
        raise InputError("config.rope_parameters: longrope: expected short_factor equal to long_factor")
    if parameters.get("attention_factor") != 1.0:
        raise InputError("config.rope_parameters: longrope: expected attention_factor 1.0")
    return RopeSpec(theta=theta, kind="factors", factors=tuple(factors))


def rope_to_config(rope: RopeSpec) -> dict[str, Any]:
    """The `rope_parameters` of a Hugging Face config that mean `rope`."""
    found: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind == "linear":
        found["factor"] = rope.factor
    elif rope.kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        found |= {name: getattr(rope, name) for name in names}
    elif rope.kind == "factors":
        # the one kind of Transformers' with a divisor a frequency
        found |= {
            "rope_type": "longrope",
            "short_factor": list(rope.factors),
            "long_factor": list(rope.factors),
            "attention_factor": 1.0,
            "factor": 1.0,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return found


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")


def _check_sizes(config: Config) -> None:
    missing = [key for key in (*_SIZES, "rms_norm_eps") if key not in config]
    if missing:
        raise InputError(f"config has no key {missing[0]}")
    for key in (*_SIZES, *(k for k in _OPTIONAL_SIZES if config.get(k) is not None)):
        value = config[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
            raise InputError(f"config.{key}: expected an integer from 1 to {_MAX_SIZE}, got {printable(repr(value))}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if not config.get("head_dim") and width % heads:
        raise InputError(f"config.num_attention_heads: expected a divisor of hidden_size {width}, got {heads}")


def decoder_spec(config: Config) -> DecoderSpec:
    """`DecoderSpec` of a dense model from its complete Hugging Face config.

    num_hidden_layers must have been compared with the files: a sub-layer is built for each.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise InputError(f"config.model_type: expected one of {sorted(FAMILIES)}, got {printable(repr(model_type))}")
    if config.get("mlp_bias"):
        raise InputError("config.mlp_bias: expected false; FFNs with bias are not supported")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise InputError(f"config.hidden_act: expected 'silu', got {printable(repr(activation))}")
    _check_sizes(config)
    num_heads = config["num_attention_heads"]
    sublayers: list[AttentionSpec | FFNSpec] = []
    for block, window in enumerate(family.windows(config)):
        attention = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            origin=(block,),
            qkv_bias=family.qkv_bias(config),
            o_bias=family.o_bias(config),
            qk_norm=family.qk_norm,
            sliding_window=window,
        )
        sublayers += [attention, FFNSpec(intermediate_size=config["intermediate_size"], origin=(block,))]
    return DecoderSpec(
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        rope=rope_from_config(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        sublayers=tuple(sublayers),
    )
