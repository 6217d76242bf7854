"""Qwen1.5, Qwen2 and Qwen2.5: biased queries, keys and values."""

from __future__ import annotations

import dataclasses

from depthprune_runtime.families.config import Config, window
from depthprune_runtime.families.family import Family, GGUFForm
from depthprune_runtime.spec import AttentionSpec


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    return dataclasses.replace(plain, qkv_bias=True, sliding_window=window(config, plain.origin[0]))


QWEN2 = Family("qwen2", attention=_attention, gguf=GGUFForm("qwen2"))
