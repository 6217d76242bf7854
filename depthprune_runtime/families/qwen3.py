"""Qwen3: q/k-norm over every head."""

from __future__ import annotations

import dataclasses

from depthprune_runtime.families.config import Config, attention_bias, window
from depthprune_runtime.families.family import Family, GGUFForm
from depthprune_runtime.spec import AttentionSpec


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    biased = attention_bias(config)
    sliding = window(config, plain.origin[0])
    return dataclasses.replace(plain, qkv_bias=biased, o_bias=biased, qk_norm=True, sliding_window=sliding)


QWEN3 = Family("qwen3", attention=_attention, gguf=GGUFForm("qwen3"))
