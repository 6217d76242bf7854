"""Llama 1 to 3.x, and what has its config."""

from __future__ import annotations

import dataclasses

from depthprune_runtime.families.config import Config, attention_bias
from depthprune_runtime.families.family import Family, GGUFForm
from depthprune_runtime.spec import AttentionSpec


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    biased = attention_bias(config)
    return dataclasses.replace(plain, qkv_bias=biased, o_bias=biased)


LLAMA = Family("llama", attention=_attention, gguf=GGUFForm("llama", interleaved=True))
