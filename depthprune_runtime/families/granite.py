"""Granite 3 and 4 dense: multipliers of embeddings, residuals, scores and logits.

Only the scores' stays. The residual stream is divided by the embeddings' multiplier instead: its norms do not see that
with an epsilon divided by its square, and what is added to it is scaled in the output projections. The logits' divisor
goes into the last norm.
"""

from __future__ import annotations

import dataclasses

from depthprune_runtime.families.config import Config, attention_bias, number
from depthprune_runtime.families.family import Family, Fold, Folds
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


GRANITE = Family("granite", attention=_attention, decoder=_decoder, folds=_folds)
