"""Rope parameters of a Hugging Face config as a `RopeSpec`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.families.config import Config, head_dim
from depthprune_runtime.spec import RopeSpec

_MAX_THETA = 1e18


def rope_from_config(config: Config) -> RopeSpec:
    """Rotary positions from `rope_parameters`, or from the older `rope_scaling` and `rope_theta`."""
    return rope_of(config, _parameters(config))


def _parameters(config: Config) -> Config:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"config.rope_parameters: expected an object, got {type(parameters).__name__}")
    return parameters


def rope_of(config: Config, parameters: Config) -> RopeSpec:
    """The rope of one set of `parameters`."""
    theta = parameters.get("rope_theta", config.get("rope_theta")) or 10000.0
    if not isinstance(theta, int | float) or not 1 <= theta <= _MAX_THETA:
        raise InputError(f"config.rope_theta: expected a number from 1 to {_MAX_THETA:g}, got {printable(repr(theta))}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    part = _rotary_dim(config, parameters)
    if kind == "default":
        return RopeSpec(theta=theta, rotary_dim=part)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=parameters["factor"], rotary_dim=part)
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            kind="llama3",
            factor=parameters["factor"],
            low_freq_factor=parameters["low_freq_factor"],
            high_freq_factor=parameters["high_freq_factor"],
            original_max_position_embeddings=parameters["original_max_position_embeddings"],
            rotary_dim=part,
        )
    if kind == "factors":
        return RopeSpec(theta=theta, kind="factors", factors=tuple(parameters["factors"]), rotary_dim=part)
    if kind == "longrope":
        return _longrope(theta, parameters, part)
    raise InputError(
        f"config.rope_parameters: expected rope_type default, linear or llama3, got {printable(repr(kind))}"
    )


def _rotary_dim(config: Config, parameters: Config) -> int | None:
    factor = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if factor in (None, 1.0):
        return None
    if not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise InputError(f"config.partial_rotary_factor: expected a number up to 1.0, got {printable(repr(factor))}")
    return int(head_dim(config) * factor)


def _longrope(theta: float, parameters: Config, rotary_dim: int | None) -> RopeSpec:
    """One divisor a frequency, if short and long contexts have the same ones and attention is not scaled."""
    factors = parameters.get("long_factor")
    if not isinstance(factors, list) or parameters.get("short_factor") != factors:
        raise InputError("config.rope_parameters: longrope: expected short_factor equal to long_factor")
    if parameters.get("attention_factor") != 1.0:
        raise InputError("config.rope_parameters: longrope: expected attention_factor 1.0")
    return RopeSpec(theta=theta, kind="factors", factors=tuple(factors), rotary_dim=rotary_dim)


def longrope_context(config: Config) -> int | None:
    """Positions that longrope's short factors hold for, where they are not those of every context."""
    parameters = _parameters(config)
    if parameters.get("rope_type") != "longrope" or parameters.get("short_factor") == parameters.get("long_factor"):
        return None
    context = parameters.get("original_max_position_embeddings")
    if not isinstance(context, int) or isinstance(context, bool) or context < 2:
        raise InputError(
            f"config.original_max_position_embeddings: expected an integer from 2 on, got {printable(repr(context))}"
        )
    return context


def short_rope(config: Config) -> RopeSpec:
    """`rope_from_config`, and of LongRoPE (Ding et al., arXiv 2402.13753) the short factors: for that context."""
    parameters = _parameters(config)
    original = longrope_context(config)
    if original is None:
        return rope_from_config(config)
    attention, factors = parameters.get("attention_factor"), parameters.get("short_factor")
    if not isinstance(factors, list):
        raise InputError("config.rope_parameters: longrope: expected a list short_factor")
    if attention is None:
        factor = parameters.get("factor") or config["max_position_embeddings"] / original
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    plain = rope_of(config, {**parameters, "rope_type": "default"})
    return dataclasses.replace(plain, kind="factors", factors=tuple(factors), attention_factor=float(attention))


def rope_to_config(rope: RopeSpec) -> dict[str, Any]:
    """The `rope_parameters` of a Hugging Face config that mean `rope`."""
    found: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind == "linear":
        found["factor"] = rope.factor
    elif rope.kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        found |= {name: getattr(rope, name) for name in names}
    elif rope.kind == "factors":
        # the one kind of Transformers' with a divisor a frequency
        found |= {
            "rope_type": "longrope",
            "short_factor": list(rope.factors),
            "long_factor": list(rope.factors),
            "attention_factor": 1.0,
            "factor": 1.0,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return found
