"""SmolLM3: some blocks, by default every fourth, know no positions."""

from __future__ import annotations

import dataclasses

from depthprune_runtime.errors import InputError
from depthprune_runtime.families.config import Config, attention_bias, window
from depthprune_runtime.families.family import Family, GGUFForm, Reader
from depthprune_runtime.spec import AttentionSpec


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    block = plain.origin[0]
    roped = config.get("no_rope_layers")  # 1: has rope
    if not isinstance(roped, list | tuple) or len(roped) != config["num_hidden_layers"]:
        raise InputError(f"config.no_rope_layers: expected a list of {config['num_hidden_layers']}, one a block")
    biased = attention_bias(config)
    sliding = window(config, block) if config.get("use_sliding_window") else None
    return dataclasses.replace(
        plain, qkv_bias=biased, o_bias=biased, sliding_window=sliding, use_rope=bool(roped[block])
    )


def _gguf_config(read: Reader, config: Config) -> Config:
    """llama.cpp takes every fourth block, whatever the model."""
    return {"no_rope_layers": [int((block + 1) % 4 != 0) for block in range(config["num_hidden_layers"])]}


SMOLLM3 = Family("smollm3", attention=_attention, gguf=GGUFForm("smollm3", interleaved=True, config=_gguf_config))
