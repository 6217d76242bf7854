"""Gemma 3, text only: as Gemma 2, with q/k-norm, and another rope where there is a window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from depthprune_runtime.errors import InputError
from depthprune_runtime.families import gemma2
from depthprune_runtime.families.config import Config, layer_type
from depthprune_runtime.families.family import Fold, Folds, GGUFForm, Reader
from depthprune_runtime.families.rope import rope_of
from depthprune_runtime.spec import AttentionSpec, RopeSpec


def _rope(config: Config, kind: str) -> RopeSpec:
    ropes = config.get("rope_parameters")
    if not isinstance(ropes, Mapping) or not isinstance(ropes.get(kind), Mapping):
        raise InputError(f"config.rope_parameters: expected an object with {kind}")
    return rope_of(config, ropes[kind])


def _attention(config: Config, plain: AttentionSpec) -> AttentionSpec:
    if config.get("attn_logit_softcapping") is not None:
        raise InputError("config.attn_logit_softcapping: expected null; Transformers computes no such cap in Gemma 3")
    sliding = layer_type(config, plain.origin[0]) == "sliding_attention"
    rope = _rope(config, "sliding_attention") if sliding else None
    return dataclasses.replace(gemma2.attention(config, plain), qk_norm=True, rope=rope)


def _folds(config: Config) -> Folds:
    more = {f"attention.{name}.weight": Fold(shift=1.0) for name in ("q_norm", "k_norm")}
    return {**gemma2.folds(config), **more}


def _gguf_config(read: Reader, config: Config) -> Config:
    local = read("rope.freq_base_swa") or 10000.0
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": read("attention.sliding_window") or 1024,
        "layer_types": gemma2.sliding_but_every(6, config),
        "final_logit_softcapping": read("final_logit_softcapping") or None,
        "query_pre_attn_scalar": gemma2.query_scalar(config, deepest=62),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


GEMMA3 = dataclasses.replace(
    gemma2.GEMMA2,
    model_type="gemma3_text",
    attention=_attention,
    rope=lambda config: _rope(config, "full_attention"),
    folds=_folds,
    gguf=GGUFForm("gemma3", config=_gguf_config, folded=True),
)
