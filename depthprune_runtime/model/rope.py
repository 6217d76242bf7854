"""Rotary tables: cos and sin of position times frequency, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from depthprune_runtime.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec | None, head_dim: int) -> Tensor:  # [D/2] float64
    """Angular frequency of each pair, in radians per token, after rescaling; 0 where nothing is rotated."""
    if rope is None:
        return torch.zeros(head_dim // 2, dtype=torch.float64)
    if rope.rotary_dim is None:
        return _rescaled(rope, head_dim)
    still = torch.zeros((head_dim - rope.rotary_dim) // 2, dtype=torch.float64)
    return torch.cat((_rescaled(rope, rope.rotary_dim), still))


def _rescaled(rope: RopeSpec, head_dim: int) -> Tensor:  # [D/2] float64
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    # float32 first, as Transformers computes it: at position 100,000 the last bit of a frequency is visible
    frequencies = (1.0 / rope.theta ** exponent.float()).double()
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "factors":
        return frequencies / torch.tensor(rope.factors, dtype=torch.float64)
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / rope.factor)


class RotaryTable:
    """cos/sin rows for positions 0 .. S-1, grown on demand: a 128k context would take 64 MB at once.

    rope: None rotates nothing, by cos 1 and sin 0.
    """

    def __init__(self, rope: RopeSpec | None, head_dim: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).float().to(device)
        self._factor = 1.0 if rope is None else rope.attention_factor
        self._rotated = head_dim // 2 if rope is None or rope.rotary_dim is None else rope.rotary_dim // 2
        self._table = torch.empty(0, 2, head_dim // 2, device=device)

    def rows(self, length: int) -> Tensor:  # [>= length, 2, D/2] float32
        if self._table.shape[0] < length:
            size = max(256, 1 << (length - 1).bit_length())
            positions = torch.arange(size, dtype=torch.float32, device=self._frequencies.device)
            angles = positions[:, None] * self._frequencies
            self._table = torch.stack((angles.cos(), angles.sin()), dim=1)
            if self._factor != 1.0:
                self._table[..., : self._rotated] *= self._factor
        return self._table
