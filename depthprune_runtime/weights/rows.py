"""Weights in plain rows [N, K], the format of files: every device and dtype has kernels for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from depthprune_runtime.weights.weight import Format, Weight

Stored = Tensor | Weight
"""What a name of a model stands for: a tensor (a norm, a bias, a weight in rows), or a weight in another format."""


@dataclass(frozen=True)
class RowsWeight:
    """A weight [N, K] as it is."""

    format: ClassVar = Format.ROWS
    precision: ClassVar = (0, 0)
    rounds_inputs: ClassVar = True
    values: Tensor  # [N, K]

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise ValueError(f"RowsWeight: expected values of shape [N, K], got {list(self.values.shape)}")

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def parts(self) -> Mapping[str, Tensor]:
        return {"values": self.values}

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:  # [T] int64 -> [T, K]
        return torch.nn.functional.embedding(ids, self.values).to(dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:  # [N, K]
        return self.values.to(dtype or self.values.dtype)

    def map(self, function: Callable[[Tensor], Tensor]) -> RowsWeight:
        return RowsWeight(function(self.values))

    def to(self, device: torch.device, dtype: torch.dtype) -> RowsWeight:
        return RowsWeight(self.values.to(device, dtype))

    def with_inputs_rounded(self, allowed: bool) -> RowsWeight:
        return self


def as_weight(stored: Stored) -> Weight:
    """`stored` as a weight: a tensor is one in rows."""
    return RowsWeight(stored) if isinstance(stored, Tensor) else stored
