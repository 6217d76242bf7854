"""Phi-3 and Phi-4-mini: packed projections on disk, heads rotated in part, LongRoPE."""

from __future__ import annotations

import dataclasses
import logging

from depthprune_runtime.families.config import Config
from depthprune_runtime.families.family import Family, GGUFForm
from depthprune_runtime.families.names import GGUF_BLOCK, GGUF_NAMES, HF_BLOCK, HF_NAMES
from depthprune_runtime.families.rope import longrope_context, short_rope
from depthprune_runtime.spec import AttentionSpec, DecoderSpec

_log = logging.getLogger("depthprune_runtime")


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    return dataclasses.replace(plain, sliding_window=config.get("sliding_window"))


def _decoder(config: Config, plain: DecoderSpec) -> DecoderSpec:
    context = longrope_context(config)
    if context is None or context >= plain.max_position_embeddings:
        return plain
    _log.warning(
        "config.rope_parameters: the context is %d and not %d: the long factors of longrope are not supported",
        context,
        plain.max_position_embeddings,
    )
    return dataclasses.replace(plain, max_position_embeddings=context)


PHI3 = Family(
    "phi3",
    attention=_attention,
    decoder=_decoder,
    rope=short_rope,
    names={
        **HF_NAMES,
        "attention.qkv_proj.weight": (HF_BLOCK + "self_attn.qkv_proj.weight",),
        "ffn.gate_up_proj.weight": (HF_BLOCK + "mlp.gate_up_proj.weight",),
    },
    partial_rotary=True,
    gguf=GGUFForm(
        "phi3",
        names={
            **GGUF_NAMES,
            "attention.qkv_proj.weight": (GGUF_BLOCK + "attn_qkv.weight",),
            "ffn.gate_up_proj.weight": (GGUF_BLOCK + "ffn_up.weight",),
        },
        config=lambda read, config: {"sliding_window": read("attention.sliding_window") or None},
    ),
)
