"""OLMo 2: norms after attention and FFN only, q/k-norm over all heads at once."""

from __future__ import annotations

import dataclasses

from depthprune_runtime.errors import InputError
from depthprune_runtime.families.config import Config, attention_bias
from depthprune_runtime.families.family import Family, GGUFForm, Reader
from depthprune_runtime.families.names import HF_BLOCK, HF_NAMES
from depthprune_runtime.spec import AttentionSpec, FFNSpec


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    biased = attention_bias(config)
    return dataclasses.replace(
        plain, qkv_bias=biased, o_bias=biased, qk_norm=True, qk_norm_over="all", pre_norm=False, post_norm=True
    )


def _ffn(config: Config, plain: FFNSpec) -> FFNSpec:
    return dataclasses.replace(plain, pre_norm=False, post_norm=True)


def _gguf_config(read: Reader, config: Config) -> Config:
    if read("attention.sliding_window"):
        raise InputError("olmo2.attention.sliding_window is not supported: OLMo 3 under the name of OLMo 2")
    return {}


OLMO2 = Family(
    "olmo2",
    attention=_attention,
    ffn=_ffn,
    names={
        **HF_NAMES,
        "attention.post_norm.weight": (HF_BLOCK + "post_attention_layernorm.weight",),
        "ffn.post_norm.weight": (HF_BLOCK + "post_feedforward_layernorm.weight",),
    },
    gguf=GGUFForm("olmo2", config=_gguf_config),
)
