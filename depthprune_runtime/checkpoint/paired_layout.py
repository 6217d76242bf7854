"""The paired layout: a block is at most one attention, then at most one FFN, each with its own widths.

DeciLM (`nemotron-nas`) folders and GGUF files of the architecture deci are made of such blocks. An attention and the
FFN behind it make a block wherever they come from, so blocks that lack a half are few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.families import rope_from_config
from depthprune_runtime.fields import checked
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec, SublayerSpec

MODEL_TYPE = "nemotron-nas"
CODE_FILES = ("configuration_decilm.py",)
_AUTO_MAP = {"AutoConfig": "configuration_decilm.DeciLMConfig"}
WIDTH_STEP = 256  # DeciLM configs name an FFN's width in such steps

Block = tuple[int | None, int | None]  # indices of its attention and its FFN


def paired_blocks(spec: DecoderSpec) -> tuple[Block, ...]:
    """Sub-layers of `spec` as blocks, as few as there can be."""
    blocks: list[Block] = []
    for index, sublayer in enumerate(spec.sublayers):
        if isinstance(sublayer, AttentionSpec):
            blocks.append((index, None))
        elif blocks and blocks[-1][1] is None:
            blocks[-1] = (blocks[-1][0], index)
        else:
            blocks.append((None, index))
    return tuple(blocks)


def numbered(spec: DecoderSpec) -> DecoderSpec:
    """`spec` with the number of its block as the origin of each sub-layer, which is what tensor names go by."""
    sublayers = list(spec.sublayers)
    for number, block in enumerate(paired_blocks(spec)):
        for index in block:
            if index is not None:
                sublayers[index] = dataclasses.replace(sublayers[index], origin=(number,))
    return dataclasses.replace(spec, sublayers=tuple(sublayers))


def ffn_multiplier(width: int, hidden_size: int) -> float:
    """The `ffn_mult` that DeciLM code turns into `width`, a multiple of `WIDTH_STEP`.

    The code rounds 2/3 of it times hidden_size up to such a multiple; this aims at the middle of the step, so that no
    rounding of the number matters.
    """
    return round(3 * (width - WIDTH_STEP // 2) / (2 * hidden_size), 6)


def _ffn_width(ffn: Mapping[str, Any], hidden_size: int, what: str) -> int:
    if ffn.get("intermediate_size") is not None:
        return int(checked(int, ffn["intermediate_size"], f"{what}.intermediate_size"))
    multiplier = checked(float, ffn.get("ffn_mult"), f"{what}.ffn_mult")
    width = int(2 * multiplier * hidden_size / 3)
    return -(-width // WIDTH_STEP) * WIDTH_STEP


def _rope_keys(rope: RopeSpec) -> dict[str, Any]:
    """The older keys, which every reader of such configs knows."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling |= {name: getattr(rope, name) for name in names}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def deci_config(spec: DecoderSpec) -> dict[str, Any]:
    """config.json of `spec`, whose attentions have one number of query heads, and FFNs widths in whole steps."""
    attention = spec.attention_sublayers()[0]
    blocks = []
    for a, f in paired_blocks(spec):
        own = None if a is None else spec.sublayers[a]
        ffn = None if f is None else spec.sublayers[f]
        group = own.num_heads // own.num_kv_heads if isinstance(own, AttentionSpec) else None
        width = ffn.intermediate_size if isinstance(ffn, FFNSpec) else None
        blocks.append(
            {
                "attention": {"n_heads_in_group": group, "no_op": own is None, "replace_with_linear": False},
                "ffn": {
                    "ffn_mult": None if width is None else ffn_multiplier(width, spec.hidden_size),
                    "no_op": ffn is None,
                    "replace_with_linear": False,
                },
            }
        )
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": _AUTO_MAP,
        "model_type": MODEL_TYPE,
        "attention_bias": attention.qkv_bias,
        "block_configs": blocks,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": max((ffn.intermediate_size for ffn in spec.ffn_sublayers()), default=WIDTH_STEP),
        "max_position_embeddings": spec.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": max(a.num_kv_heads for a in spec.attention_sublayers()),
        "rms_norm_eps": spec.rms_norm_eps,
        **_rope_keys(spec.rope),
        "tie_word_embeddings": spec.tie_word_embeddings,
        "vocab_size": spec.vocab_size,
    }


def _block(config: Mapping[str, Any], number: int) -> list[SublayerSpec]:
    """Sub-layers of one entry of `block_configs`."""
    what = f"config.block_configs[{number}]"
    entry = checked(dict[str, dict[str, Any]], config["block_configs"][number], what)
    attention, ffn = entry.get("attention", {}), entry.get("ffn", {})
    for key in ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens", "moe", "mamba"):
        if attention.get(key) or ffn.get(key):
            raise InputError(f"{what}: {key} is not supported")
    found: list[SublayerSpec] = []
    width = checked(int, config.get("hidden_size"), "config.hidden_size")
    if not attention.get("no_op"):
        heads = checked(int, config.get("num_attention_heads"), "config.num_attention_heads")
        group = checked(int, attention.get("n_heads_in_group"), f"{what}.attention.n_heads_in_group")
        if heads < 1 or group < 1 or heads % group:
            raise InputError(f"{what}.attention.n_heads_in_group: expected a divisor of {heads}, got {group}")
        head_dim = checked(int, config.get("head_dim") or width // heads, "config.head_dim")
        bias = bool(config.get("attention_bias"))
        found.append(AttentionSpec(heads, heads // group, head_dim, (number,), bias, bias))
    if not ffn.get("no_op"):
        found.append(FFNSpec(_ffn_width(ffn, width, f"{what}.ffn"), (number,)))
    return found


def deci_spec(config: Mapping[str, Any], tied: bool) -> DecoderSpec:
    """Spec of a DeciLM config. num_hidden_layers must have been compared with the files."""
    count = config["num_hidden_layers"]
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != count:
        raise InputError(f"config.block_configs: expected a list of {count}, one a block")
    if config.get("mlp_bias") or config.get("hidden_act", "silu") != "silu":
        act = printable(repr(config.get("hidden_act")))
        raise InputError(f"config: expected mlp_bias false and hidden_act 'silu', got {act}")
    return DecoderSpec(
        hidden_size=checked(int, config.get("hidden_size"), "config.hidden_size"),
        vocab_size=checked(int, config.get("vocab_size"), "config.vocab_size"),
        max_position_embeddings=checked(int, config.get("max_position_embeddings"), "config.max_position_embeddings"),
        rms_norm_eps=checked(float, config.get("rms_norm_eps"), "config.rms_norm_eps"),
        rope=rope_from_config(config),
        tie_word_embeddings=tied,
        sublayers=tuple(sublayer for number in range(count) for sublayer in _block(config, number)),
    )
