"""Seed-OSS: biases of queries, keys and values apart from that of the output."""

from __future__ import annotations

import dataclasses

from depthprune_runtime.families.config import Config, attention_bias
from depthprune_runtime.families.family import Family
from depthprune_runtime.spec import AttentionSpec


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    return dataclasses.replace(
        plain, qkv_bias=attention_bias(config), o_bias=bool(config.get("attention_out_bias", False))
    )


SEED_OSS = Family("seed_oss", attention=_attention)
