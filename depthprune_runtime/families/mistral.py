"""Mistral: one sliding window for all blocks."""

from __future__ import annotations

import dataclasses

from depthprune_runtime.families.config import Config, window
from depthprune_runtime.families.family import Family
from depthprune_runtime.spec import AttentionSpec


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    return dataclasses.replace(plain, sliding_window=window(config, plain.origin[0]))


MISTRAL = Family("mistral", attention=_attention)
