"""From a config and its family to a `DecoderSpec`."""

from __future__ import annotations

from depthprune_runtime.errors import InputError
from depthprune_runtime.families.config import Config, activation, check_sizes, head_dim
from depthprune_runtime.families.family import Family
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, SublayerSpec


def family_spec(family: Family, config: Config) -> DecoderSpec:
    """`DecoderSpec` of a dense model of `family` from its complete Hugging Face config."""
    if config.get("mlp_bias"):
        raise InputError("config.mlp_bias: expected false; FFNs with bias are not supported")
    act = activation(config, family.activation_key)
    check_sizes(config)
    num_heads = config["num_attention_heads"]
    sublayers: list[SublayerSpec] = []
    for block in range(config["num_hidden_layers"]):
        attention = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=head_dim(config),
            origin=(block,),
        )
        ffn = FFNSpec(intermediate_size=config["intermediate_size"], origin=(block,), activation=act)
        sublayers += [family.attention(config, attention), family.ffn(config, ffn)]
    rope = family.rope(config)
    if rope.rotary_dim is not None and not family.partial_rotary:
        raise InputError("config.partial_rotary_factor: expected 1.0 (whole heads rotated)")
    plain = DecoderSpec(
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        rope=rope,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        sublayers=tuple(sublayers),
    )
    return family.decoder(config, plain)
