"""Rope parameters of a Hugging Face config as a `RopeSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.families.config import Config, head_dim
from depthprune_runtime.spec import RopeSpec

_MAX_THETA = 1e18


def rope_spec(config: Config) -> RopeSpec:
    """The config's rope, the same for all blocks."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"config.rope_parameters: expected an object, got {type(parameters).__name__}")
    return rope_of(config, parameters)


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
        return _longrope(config, parameters, theta, part)
    raise InputError(
        f"config.rope_parameters: expected rope_type default, linear, llama3 or longrope, got {printable(repr(kind))}"
    )


def _rotary_dim(config: Config, parameters: Config) -> int | None:
    factor = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if factor in (None, 1.0):
        return None
    if not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise InputError(f"config.partial_rotary_factor: expected a number up to 1.0, got {printable(repr(factor))}")
    return int(head_dim(config) * factor)


def longrope_context(parameters: Config) -> int:
    """Positions that the short factors hold for."""
    return int(parameters["original_max_position_embeddings"])


def _longrope(config: Config, parameters: Config, theta: float, rotary_dim: int | None) -> RopeSpec:
    """LongRoPE (Ding et al., arXiv 2402.13753) at its short factors, for contexts as long as the original one."""
    original = longrope_context(parameters)
    attention = parameters.get("attention_factor")
    if attention is None:
        factor = parameters.get("factor") or config["max_position_embeddings"] / original
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = tuple(parameters["short_factor"])
    return RopeSpec(
        theta=theta, kind="factors", factors=factors, rotary_dim=rotary_dim, attention_factor=float(attention)
    )
