"""Rotary frequencies that a GGUF file stores as divisors, told by the rule that made them."""

from __future__ import annotations

import math

from depthprune_runtime.model.rope import inverse_frequencies
from depthprune_runtime.spec import DecoderSpec, RopeSpec

_FACTORS = (8.0, 32.0)  # of Llama 3.1 and 3.2
_CLOSE = 1e-5


def divisors(rope: RopeSpec, head_dim: int) -> list[float]:
    """What each frequency of `rope` is divided by."""
    plain = inverse_frequencies(RopeSpec(theta=rope.theta), head_dim)
    return [float(value) for value in plain / inverse_frequencies(rope, head_dim)]


def recognized(spec: DecoderSpec) -> RopeSpec:
    """The `llama3` rule where the divisors of `spec` are those of a known Llama; else the rope of `spec`."""
    if spec.rope.kind != "factors":
        return spec.rope
    for factor in _FACTORS:
        rule = RopeSpec(spec.rope.theta, "llama3", factor, 1.0, 4.0, 8192)
        wanted = divisors(rule, 2 * len(spec.rope.factors))
        if all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(spec.rope.factors, wanted, strict=True)):
            return rule
    return spec.rope
