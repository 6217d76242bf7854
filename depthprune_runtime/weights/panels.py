"""Dense weights in panels: how the CPU kernels read bfloat16 fastest.

A weight [N, K] is cut into panels of 16 rows; a panel holds pairs of neighbouring columns, over its rows:

    panels [P, K' / 2, 16, 2]      panels[p, j, r, i] = weight[16 p + r, 2 j + i]

with P = ceil(N / 16), K' = K rounded up to 32, and zeros where there is no row or column. It is the layout of vector
and matrix instructions alike (AVX-512 BF16, AMX): a decode step reads panels from end to end, and a prompt multiplies
them as they are; AVX2 and AVX-512 read them pair by pair, too. Files keep plain rows; `Runtime.load` packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from depthprune_runtime.host.extension import extension
from depthprune_runtime.weights.weight import Format

PANEL_ROWS = 16
_COLUMNS = 32  # rows are filled up to a multiple of it


def panel_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """Shape of the panels of a weight [out_features, in_features]."""
    return -(-out_features // PANEL_ROWS), -(-in_features // _COLUMNS) * _COLUMNS // 2, PANEL_ROWS, 2


def to_panels(weight: Tensor) -> Tensor:  # [N, K] -> [P, K' / 2, 16, 2]
    """The panels of `weight`, in its dtype."""
    count, pairs, rows, _ = panel_shape(*weight.shape)
    filled = weight.new_zeros(count * rows, pairs * 2)
    filled[: weight.shape[0], : weight.shape[1]] = weight
    return filled.view(count, rows, pairs, 2).transpose(1, 2).contiguous()


def from_panels(panels: Tensor, out_features: int, in_features: int) -> Tensor:  # -> [N, K]
    """The rows that `panels` hold."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * PANEL_ROWS, -1)[:out_features, :in_features]


def panels_pay() -> bool:
    """Whether this machine has kernels for bfloat16 in panels: from AVX2 on."""
    module = extension()
    return module is not None and str(module.cpu_level()) != "generic"


@dataclass(frozen=True)
class PanelWeight:
    """A projection's bfloat16 weight [out_features, in_features] in panels."""

    format: ClassVar = Format.PANELS
    precision: ClassVar = (0, 0)
    rounds_inputs: ClassVar = True
    panels: Tensor  # [P, K' / 2, 16, 2]
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        expected = panel_shape(self.out_features, self.in_features)
        if tuple(self.panels.shape) != expected or self.panels.dtype != torch.bfloat16:
            raise ValueError(
                f"PanelWeight: expected panels of shape {list(expected)} in bfloat16, "
                f"got {list(self.panels.shape)} in {self.panels.dtype}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def parts(self) -> Mapping[str, Tensor]:
        return {"panels": self.panels}

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:  # [T] int64 -> [T, K]
        pairs = self.panels[ids // PANEL_ROWS, :, ids % PANEL_ROWS]  # [T, K' / 2, 2]
        return pairs.flatten(1)[:, : self.in_features].to(dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:  # [N, K]
        """The weight as plain rows: a copy."""
        return from_panels(self.panels, self.out_features, self.in_features).to(dtype or self.panels.dtype)

    def map(self, function: Callable[[Tensor], Tensor]) -> PanelWeight:
        return PanelWeight(function(self.panels), self.out_features, self.in_features)

    def to(self, device: torch.device, dtype: torch.dtype) -> PanelWeight:
        return self.map(lambda panels: panels.to(device))

    def with_inputs_rounded(self, allowed: bool) -> PanelWeight:
        return self
