"""Gemma 2: norms before and after, soft caps, alternate sliding windows. Gains are stored as w - 1."""

from __future__ import annotations

import dataclasses

from depthprune_runtime.errors import InputError
from depthprune_runtime.families.config import Config, attention_bias, number, window
from depthprune_runtime.families.family import Family, Fold, Folds, GGUFForm, Reader
from depthprune_runtime.families.names import HF_BLOCK, HF_NAMES
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec

NAMES = {
    **HF_NAMES,
    "attention.post_norm.weight": (HF_BLOCK + "post_attention_layernorm.weight",),
    "ffn.norm.weight": (HF_BLOCK + "pre_feedforward_layernorm.weight",),
    "ffn.post_norm.weight": (HF_BLOCK + "post_feedforward_layernorm.weight",),
}
_GAINS = ("norm", "attention.norm", "attention.post_norm", "ffn.norm", "ffn.post_norm")


def cap(config: Config, key: str) -> float | None:
    return None if config.get(key) is None else number(config, key)


def attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    if config.get("use_bidirectional_attention"):
        raise InputError("config.use_bidirectional_attention: expected false; only causal attention is supported")
    biased = attention_bias(config)
    return dataclasses.replace(
        plain,
        qkv_bias=biased,
        o_bias=biased,
        sliding_window=window(config, plain.origin[0]),
        post_norm=True,
        scale=number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        softcap=cap(config, "attn_logit_softcapping"),
    )


def ffn(config: Config, plain: FFNSpec) -> FFNSpec:
    return dataclasses.replace(plain, post_norm=True)


def decoder(config: Config, plain: DecoderSpec) -> DecoderSpec:
    return dataclasses.replace(
        plain, embedding_scale=plain.hidden_size**0.5, logit_softcap=cap(config, "final_logit_softcapping")
    )


def folds(config: Config) -> Folds:
    return {f"{name}.weight": Fold(shift=1.0) for name in _GAINS}


def query_scalar(config: Config, deepest: int) -> int:
    """As llama.cpp has it: the largest model of the family, by its number of blocks, is unlike the others."""
    widest = config["num_hidden_layers"] == deepest
    return int(config["hidden_size"] // config["num_attention_heads"] if widest else config["head_dim"])


def sliding_but_every(interval: int, config: Config) -> list[str]:
    blocks = range(config["num_hidden_layers"])
    return ["full_attention" if (block + 1) % interval == 0 else "sliding_attention" for block in blocks]


def _gguf_config(read: Reader, config: Config) -> Config:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": read("attention.sliding_window") or 4096,
        "layer_types": sliding_but_every(2, config),
        "attn_logit_softcapping": read("attn_logit_softcapping") or 50.0,
        "final_logit_softcapping": read("final_logit_softcapping") or 30.0,
        "query_pre_attn_scalar": query_scalar(config, deepest=46),
    }


GEMMA2 = Family(
    "gemma2",
    attention=attention,
    ffn=ffn,
    decoder=decoder,
    names=NAMES,
    folds=folds,
    activation_key="hidden_activation",
    gguf=GGUFForm("gemma2", config=_gguf_config, folded=True),
)
