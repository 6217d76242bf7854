"""Granite 3 and 4 dense: multipliers of embeddings, residuals, scores and logits.

Only the scores' stays. The residual stream is divided by the embeddings' multiplier instead: its norms do not see that
with an epsilon divided by its square, and what is added to it is scaled in the output projections. The logits' divisor
goes into the last norm.
"""

from __future__ import annotations

import dataclasses

from depthprune_runtime.families.config import Config, attention_bias, head_dim, number
from depthprune_runtime.families.family import Family, Fold, Folds, GGUFForm, Reader
from depthprune_runtime.spec import AttentionSpec, DecoderSpec


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    biased = attention_bias(config)
    scale = number(config, "attention_multiplier", 1.0)
    return dataclasses.replace(plain, qkv_bias=biased, o_bias=biased, scale=scale)


def _decoder(config: Config, plain: DecoderSpec) -> DecoderSpec:
    epsilon = plain.rms_norm_eps / number(config, "embedding_multiplier", 1.0) ** 2
    return dataclasses.replace(plain, rms_norm_eps=epsilon)


def _folds(config: Config) -> Folds:
    added = Fold(factor=number(config, "residual_multiplier", 1.0) / number(config, "embedding_multiplier", 1.0))
    return {
        "attention.o_proj.weight": added,
        "attention.o_proj.bias": added,
        "ffn.down_proj.weight": added,
        "norm.weight": Fold(factor=1.0 / number(config, "logits_scaling", 1.0)),
    }


_GGUF = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}


def _gguf_config(read: Reader, config: Config) -> Config:
    found = {key: read(name) for key, name in _GGUF.items()}
    missing = {"attention_multiplier": head_dim(config) ** -0.5}
    return {key: value or missing.get(key, 1.0) for key, value in found.items()}


GRANITE = Family(
    "granite",
    attention=_attention,
    decoder=_decoder,
    folds=_folds,
    gguf=GGUFForm("granite", interleaved=True, reads=tuple(_GGUF.values()), config=_gguf_config),
)
