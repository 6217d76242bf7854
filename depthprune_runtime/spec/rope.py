"""Rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthprune_runtime.spec.checks import later, require, require_int, require_number

RopeKind = Literal["default", "linear", "llama3", "factors"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: frequencies `theta ** (-2 i / head_dim)`, optionally rescaled.

    kind: `default`, `linear` (all divided by `factor`), `llama3` (Llama 3.1's wavelength-dependent
    division), `factors` (one divisor a frequency, as GGUF files store them).

    rotary_dim: how much of a head is rotated, None: all of it. The exponents are `-2 i / rotary_dim` then, and the
    other pairs (i, i + head_dim / 2), from i = rotary_dim / 2 on, stay as they are: imports order the rows so.
    attention_factor: cosine and sine of the rotated pairs are multiplied by it.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    rotary_dim: int | None = later(None)
    attention_factor: float = later(1.0)

    def __post_init__(self) -> None:
        kinds = ("default", "linear", "llama3", "factors")
        require(self.kind in kinds, f"rope.kind: expected one of {kinds}, got {self.kind!r}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
            require_number("rope", name, getattr(self, name))
        require_int("rope", "original_max_position_embeddings", self.original_max_position_embeddings, 1)
        for value in self.factors:
            require_number("rope", "factors", value)
        if self.kind == "llama3":
            require(
                self.high_freq_factor > self.low_freq_factor,
                f"rope: expected high_freq_factor > low_freq_factor, got {self.high_freq_factor} "
                f"and {self.low_freq_factor}",
            )
        require(
            (self.kind == "factors") == bool(self.factors),
            f"rope.factors: kind {self.kind!r} with {len(self.factors)} factors",
        )
        if self.rotary_dim is not None:
            require_int("rope", "rotary_dim", self.rotary_dim, 2)
            require(self.rotary_dim % 2 == 0, f"rope.rotary_dim: expected an even number, got {self.rotary_dim}")

    def check_head_dim(self, head_dim: int) -> None:
        """Refuse heads of a size that this rope does not fit."""
        rotated = head_dim if self.rotary_dim is None else self.rotary_dim
        require(rotated <= head_dim, f"rope.rotary_dim: expected at most head_dim {head_dim}, got {rotated}")
        require(
            self.kind != "factors" or rotated == 2 * len(self.factors),
            f"rope.factors: expected {rotated // 2} of them, got {len(self.factors)}",
        )
