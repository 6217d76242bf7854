"""The anchored layout of a Hugging Face folder: a layer is one attention and the FFNs around it.

FFNs belong to the attention before them; those before the first attention go into layer 0. So a layer has one KV slot,
as Transformers and vLLM expect, and every order of sub-layers with an attention in it can be told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.families import rope_from_config, rope_to_config
from depthprune_runtime.fields import checked, from_fields
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, Shape, SublayerSpec

MODEL_TYPE = "depthprune"
ARCHITECTURE = "DepthPruneForCausalLM"
CODE_FILES = ("configuration_depthprune.py", "modeling_depthprune.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_depthprune.DepthPruneConfig",
    "AutoModel": "modeling_depthprune.DepthPruneModel",
    "AutoModelForCausalLM": "modeling_depthprune.DepthPruneForCausalLM",
}
_ATTENTION = {f"{x}_proj.{part}": f"self_attn.{x}_proj.{part}" for x in "qkvo" for part in ("weight", "bias")}
_NORMS = {f"{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
_WHOLE = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class AnchoredLayer:
    """Indices of sub-layers: FFNs that run before the attention, the attention, FFNs after it."""

    before: tuple[int, ...]
    attention: int
    after: tuple[int, ...]

    @property
    def sublayers(self) -> tuple[int, ...]:
        return (*self.before, self.attention, *self.after)


def anchored_layers(spec: DecoderSpec) -> tuple[AnchoredLayer, ...]:
    """The layers of `spec`, which must have an attention."""
    starts = [i for i, sublayer in enumerate(spec.sublayers) if isinstance(sublayer, AttentionSpec)]
    ends = [*starts[1:], len(spec.sublayers)]
    layers = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        before = tuple(range(start)) if number == 0 else ()
        layers.append(AnchoredLayer(before, start, tuple(range(start + 1, end))))
    return tuple(layers)


def _attention_shapes(attention: AttentionSpec, width: int, per_head: bool) -> dict[str, dict[str, Shape]]:
    """Short packed name -> leaf name -> shape."""
    sizes = {"q": attention.q_size, "k": attention.kv_size, "v": attention.kv_size}
    shapes: dict[str, dict[str, Shape]] = {"norm.weight": {"input_layernorm.weight": (width,)}}
    shapes["qkv_proj.weight"] = {_ATTENTION[f"{x}_proj.weight"]: (size, width) for x, size in sizes.items()}
    if attention.qkv_bias:
        shapes["qkv_proj.bias"] = {_ATTENTION[f"{x}_proj.bias"]: (size,) for x, size in sizes.items()}
    if attention.qk_norm:
        for name, heads in (("q_norm.weight", attention.num_heads), ("k_norm.weight", attention.num_kv_heads)):
            shapes[name] = {_NORMS[name]: (heads, attention.head_dim) if per_head else (attention.head_dim,)}
    shapes["o_proj.weight"] = {_ATTENTION["o_proj.weight"]: (width, attention.q_size)}
    if attention.o_bias:
        shapes["o_proj.bias"] = {_ATTENTION["o_proj.bias"]: (width,)}
    return shapes


def _ffn_shapes(ffn: FFNSpec, width: int) -> dict[str, dict[str, Shape]]:
    shapes: dict[str, dict[str, Shape]] = {
        "norm.weight": {"norm.weight": (width,)},
        "gate_up_proj.weight": {f"{x}_proj.weight": (ffn.intermediate_size, width) for x in ("gate", "up")},
        "down_proj.weight": {"down_proj.weight": (width, ffn.intermediate_size)},
    }
    if ffn.down_bias:
        shapes["down_proj.bias"] = {"down_proj.bias": (width,)}
    return shapes


def anchored_shapes(spec: DecoderSpec, per_head: Collection[int]) -> dict[str, dict[str, Shape]]:
    """Packed name -> name in the folder -> shape there.

    per_head: attentions whose q/k gains differ from head to head; the others store one gain for all.
    """
    found: dict[str, dict[str, Shape]] = {}
    shapes = spec.tensor_shapes()
    for name, whole in _WHOLE.items():
        if name in shapes:
            found[name] = {whole: shapes[name]}
    for number, layer in enumerate(anchored_layers(spec)):
        ffns = (*layer.before, *layer.after)
        for index in layer.sublayers:
            sublayer = spec.sublayers[index]
            if isinstance(sublayer, AttentionSpec):
                prefix = f"model.layers.{number}."
                parts = _attention_shapes(sublayer, spec.hidden_size, index in per_head)
            else:
                prefix = f"model.layers.{number}.mlps.{ffns.index(index)}."
                parts = _ffn_shapes(sublayer, spec.hidden_size)
            for short, sources in parts.items():
                found[f"sublayers.{index}.{short}"] = {prefix + leaf: shape for leaf, shape in sources.items()}
    return {name: found[name] for name in shapes}


@dataclass(frozen=True)
class _Layer:
    """What `per_layer_config` says of one layer; Transformers leaves out what its config says for all."""

    num_attention_heads: int
    num_key_value_heads: int
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: Literal["shared", "per_head"] | None = None
    mlps_before: int = 0
    intermediate_sizes: tuple[int, ...] | None = None
    mlp_down_bias: tuple[bool, ...] | None = None


_KEYS = tuple(_Layer.__dataclass_fields__)


def _layer_config(spec: DecoderSpec, layer: AnchoredLayer, per_head: Collection[int]) -> dict[str, Any]:
    attention = spec.sublayers[layer.attention]
    assert isinstance(attention, AttentionSpec)
    ffns = [f for i in (*layer.before, *layer.after) if isinstance(f := spec.sublayers[i], FFNSpec)]
    norm = "per_head" if layer.attention in per_head else "shared"
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "attention_bias": attention.qkv_bias,
        "attention_output_bias": attention.o_bias,
        "qk_norm": norm if attention.qk_norm else None,
        "mlps_before": len(layer.before),
        "intermediate_sizes": [ffn.intermediate_size for ffn in ffns],
        "mlp_down_bias": [ffn.down_bias for ffn in ffns],
    }


def anchored_config(spec: DecoderSpec, per_head: Collection[int], lineage: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of `spec`. lineage: what else the folder remembers, such as plan and provenance."""
    layers = anchored_layers(spec)
    attentions = spec.attention_sublayers()
    widest = max(attentions, key=lambda attention: attention.num_heads)
    windows = [attention.sliding_window for attention in attentions]
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "auto_map": _AUTO_MAP,
        "model_type": MODEL_TYPE,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": max((ffn.intermediate_size for ffn in spec.ffn_sublayers()), default=1),
        "num_hidden_layers": len(layers),
        "num_attention_heads": widest.num_heads,
        "num_key_value_heads": widest.num_kv_heads,
        "head_dim": widest.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": rope_to_config(spec.rope),
        "tie_word_embeddings": spec.tie_word_embeddings,
    }
    if any(windows):
        config["sliding_window"] = next(window for window in windows if window)
        config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    config["per_layer_config"] = {str(i): _layer_config(spec, layer, per_head) for i, layer in enumerate(layers)}
    config[MODEL_TYPE] = {"origins": [list(sublayer.origin) for sublayer in spec.sublayers], **lineage}
    return config


def _read_layers(config: Mapping[str, Any], count: int) -> list[_Layer]:
    stored = checked(dict[str, Any] | None, config.get("per_layer_config"), "config.per_layer_config") or {}
    numbered = {int(key): value for key, value in stored.items() if key.isdecimal() and len(key) < 9}
    layers = []
    for number in range(count):
        own = checked(dict[str, Any], numbered.get(number, {}), f"config.per_layer_config.{number}")
        values = {key: own.get(key, config.get(key)) for key in _KEYS if key in own or key in config}
        layers.append(from_fields(_Layer, values, f"config.per_layer_config.{number}"))
    return layers


def _window(config: Mapping[str, Any], layer: int) -> int | None:
    types = config.get("layer_types")
    if types is None:
        return None
    window = config.get("sliding_window")
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != config["num_hidden_layers"]:
        raise InputError(f"config.layer_types: expected a list of {config['num_hidden_layers']}, one a layer")
    if types[layer] not in known or (types[layer] == "sliding_attention" and window is None):
        raise InputError(f"config.layer_types: expected {sorted(known)}, got {printable(repr(types[layer]))}")
    return known[types[layer]]


def _ffns(layer: _Layer, what: str) -> list[FFNSpec]:
    sizes = layer.intermediate_sizes or ()
    biases = (False,) * len(sizes) if layer.mlp_down_bias is None else layer.mlp_down_bias
    if len(biases) != len(sizes) or not 0 <= layer.mlps_before <= len(sizes):
        raise InputError(f"{what}: expected a bias an FFN, and mlps_before among {len(sizes)} FFNs")
    return [FFNSpec(size, (0,), down_bias=bias) for size, bias in zip(sizes, biases, strict=True)]


def _with_origins(sublayers: list[SublayerSpec], layers: list[int], lineage: Mapping[str, Any]) -> list[SublayerSpec]:
    """layers: of each sub-layer, which stands for its origin where the folder does not remember it."""
    origins = checked(tuple[tuple[int, ...], ...], lineage.get("origins", [[n] for n in layers]), "config.origins")
    if len(origins) != len(sublayers):
        raise InputError(f"config.{MODEL_TYPE}.origins: expected {len(sublayers)}, one a sub-layer, got {len(origins)}")
    return [dataclasses.replace(s, origin=origin) for s, origin in zip(sublayers, origins, strict=True)]


def anchored_spec(config: Mapping[str, Any], tied: bool) -> tuple[DecoderSpec, frozenset[int]]:
    """Spec of a folder's config.json, and the attentions whose q/k gains differ from head to head.

    num_hidden_layers must have been compared with the files. Raises InputError for what `anchored_config` never writes.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.hidden_act: expected 'silu', got {printable(repr(config['hidden_act']))}")
    head_dim = checked(int, config.get("head_dim"), "config.head_dim")
    sublayers: list[SublayerSpec] = []
    numbers: list[int] = []
    per_head = set()
    for number, layer in enumerate(_read_layers(config, config["num_hidden_layers"])):
        ffns = _ffns(layer, f"config.per_layer_config.{number}")
        attention = AttentionSpec(
            layer.num_attention_heads,
            layer.num_key_value_heads,
            head_dim,
            (number,),
            layer.attention_bias,
            layer.attention_output_bias,
            layer.qk_norm is not None,
            _window(config, number),
        )
        if number and layer.mlps_before:
            raise InputError(f"config.per_layer_config.{number}.mlps_before: expected 0 after the first layer")
        if layer.qk_norm == "per_head":
            per_head.add(len(sublayers) + layer.mlps_before)
        sublayers += [*ffns[: layer.mlps_before], attention, *ffns[layer.mlps_before :]]
        numbers += [number] * (len(ffns) + 1)
    lineage = checked(dict[str, Any], config.get(MODEL_TYPE) or {}, f"config.{MODEL_TYPE}")
    spec = DecoderSpec(
        hidden_size=checked(int, config.get("hidden_size"), "config.hidden_size"),
        vocab_size=checked(int, config.get("vocab_size"), "config.vocab_size"),
        max_position_embeddings=checked(int, config.get("max_position_embeddings"), "config.max_position_embeddings"),
        rms_norm_eps=checked(float, config.get("rms_norm_eps"), "config.rms_norm_eps"),
        rope=rope_from_config(config),
        tie_word_embeddings=tied,
        sublayers=tuple(_with_origins(sublayers, numbers, lineage)),
    )
    return spec, frozenset(per_head)
