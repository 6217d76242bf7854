"""Weights of a projection in 8 or 4 bits: what they mean, and how they lie in memory.

A weight [N, K] is cut along K into groups of G = 32, 64 or 128 (the last filled up); each group of a row has a scale
and, where asymmetric, a zero point. A code u of 0 .. 2^bits - 1 stands for

    w = scale * (u - zero)        zero = 2^(bits - 1) where symmetric

Codes lie in panels of 16 rows, in the order in which the CPU kernels read them, so that a mapped file is used as it
is: `codes` is uint8, and byte [p, j, r, i] holds

    8 bits   [P, K' / 4, 16, 4]   the code of row 16 p + r, column 4 j + i
    4 bits   [P, K' / 8, 16, 4]   that of column 8 j + i in its low half, that of column 8 j + 4 + i in its high half

with P = ceil(N / 16) and K' = K rounded up to whole groups. `scales` is bfloat16 [P, K' / G, 16] (the range of
float32, and codes are chosen for the rounded scale); `zeros` uint8 of the same shape. Rows and columns that fill up
have no meaning, except that the scale of a filling row is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from depthprune_runtime.errors import InputError
from depthprune_runtime.weights.weight import Format

PANEL_ROWS = 16
BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
_STRIP_ELEMENTS = 1 << 23  # of a weight, dequantised through float32 at a time


@dataclass(frozen=True)
class QuantSpec:
    """How a projection is quantised. bits: 8 or 4; group_size: inputs that share a scale; symmetric: no zero points."""

    bits: int
    group_size: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"bits: expected 8 or 4, got {self.bits!r}")
        if self.group_size not in GROUP_SIZES:
            raise InputError(f"group_size: expected 32, 64 or 128, got {self.group_size!r}")
        if not isinstance(self.symmetric, bool):
            raise InputError(f"symmetric: expected true or false, got {self.symmetric!r}")

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of `codes`, `scales` and, where asymmetric, `zeros`."""
        panels = -(-out_features // PANEL_ROWS)
        groups = -(-in_features // self.group_size)
        columns = 32 // self.bits  # of one [16, 4] tile
        shapes: dict[str, tuple[int, ...]] = {
            "codes": (panels, groups * self.group_size // columns, PANEL_ROWS, 4),
            "scales": (panels, groups, PANEL_ROWS),
        }
        if not self.symmetric:
            shapes["zeros"] = (panels, groups, PANEL_ROWS)
        return shapes


@dataclass(frozen=True)
class QuantizedWeight:
    """A projection's weight [out_features, in_features] in the layout above.

    rounds_inputs: whether kernels may round the inputs that it meets to 8 bits, which makes them several times faster.
    """

    format: ClassVar = Format.CODES
    spec: QuantSpec
    out_features: int
    in_features: int
    codes: Tensor  # uint8
    scales: Tensor  # bfloat16
    zeros: Tensor | None = None  # uint8
    rounds_inputs: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        shapes = self.spec.shapes(self.out_features, self.in_features)
        dtypes = {"codes": torch.uint8, "scales": torch.bfloat16, "zeros": torch.uint8}
        for name, dtype in dtypes.items():
            tensor: Tensor | None = getattr(self, name)
            wanted = shapes.get(name)
            got = None if tensor is None else tuple(tensor.shape)
            if got != wanted or (tensor is not None and tensor.dtype != dtype):
                raise ValueError(
                    f"QuantizedWeight: expected {name} of shape {wanted} in {dtype}, "
                    f"got {got} in {None if tensor is None else tensor.dtype}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    @property
    def precision(self) -> tuple[int, int]:
        return self.spec.bits, self.spec.group_size

    def parts(self) -> Mapping[str, Tensor]:
        """By the names of `QuantSpec.shapes`."""
        zeros = {} if self.zeros is None else {"zeros": self.zeros}
        return {"codes": self.codes, "scales": self.scales} | zeros

    @classmethod
    def from_parts(cls, spec: QuantSpec, shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> QuantizedWeight:
        """The weight of `shape` [N, K] that `parts` were taken from."""
        rows, columns = shape
        return cls(spec, rows, columns, parts["codes"], parts["scales"], parts.get("zeros"))

    @classmethod
    def from_codes(
        cls,
        spec: QuantSpec,
        codes: Tensor,  # [N, K] integers, 0 .. 2^bits - 1
        scales: Tensor,  # [N, ceil(K / G)] floating point, exact in bfloat16
        zeros: Tensor | None = None,  # [N, ceil(K / G)] integers
    ) -> QuantizedWeight:
        """Lay out codes that a quantiser chose."""
        rows, columns = codes.shape
        shapes = spec.shapes(rows, columns)
        panels, groups, _ = shapes["scales"]
        filled = torch.zeros(panels * PANEL_ROWS, groups * spec.group_size, dtype=torch.uint8, device=codes.device)
        filled[:rows, :columns] = codes
        if spec.bits == 8:
            tiles = filled.view(panels, PANEL_ROWS, -1, 4).transpose(1, 2)
        else:
            halves = filled.view(panels, PANEL_ROWS, -1, 2, 4)
            tiles = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(1, 2)
        return cls(
            spec,
            rows,
            columns,
            tiles.contiguous(),
            _to_panels(scales, panels).to(torch.bfloat16),
            None if zeros is None else _to_panels(zeros, panels).to(torch.uint8),
        )

    def unpack(self) -> Tensor:  # [N, K] uint8
        """The codes by row and column."""
        panels, tiles = self.codes.shape[:2]
        by_row = self.codes.transpose(1, 2)  # [P, 16, tiles, 4]
        if self.spec.bits == 4:
            by_row = torch.stack((by_row & 15, by_row >> 4), dim=3)  # [P, 16, tiles, 2, 4]
        width = tiles * (32 // self.spec.bits)
        return by_row.reshape(panels * PANEL_ROWS, width)[: self.out_features, : self.in_features]

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:  # [T] int64 -> [T, K]
        panel, row = ids // PANEL_ROWS, ids % PANEL_ROWS
        codes = self.codes[panel, :, row]  # [T, tiles, 4]
        if self.spec.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=2)
        wide = codes.reshape(ids.shape[0], -1, self.spec.group_size).float()  # [T, groups, G]
        zero = self.spec.levels / 2 if self.zeros is None else self.zeros[panel, :, row].float()[..., None]
        scaled = (wide - zero) * self.scales[panel, :, row].float()[..., None]
        return scaled.flatten(1)[:, : self.in_features].to(dtype)

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        zeros = None if self.zeros is None else function(self.zeros)
        return dataclasses.replace(self, codes=function(self.codes), scales=function(self.scales), zeros=zeros)

    def to(self, device: torch.device, dtype: torch.dtype) -> QuantizedWeight:
        return self.map(lambda part: part.to(device))

    def with_inputs_rounded(self, allowed: bool) -> QuantizedWeight:
        return dataclasses.replace(self, rounds_inputs=allowed)

    def strips(self, elements: int) -> Iterator[QuantizedWeight]:
        """The weight cut into runs of whole panels of about `elements` elements, one after the other; views."""
        panels = max(1, elements // (PANEL_ROWS * self.in_features))
        for first in range(0, self.codes.shape[0], panels):
            part = slice(first, first + panels)
            rows = min(self.out_features - first * PANEL_ROWS, panels * PANEL_ROWS)
            zeros = None if self.zeros is None else self.zeros[part]
            yield dataclasses.replace(
                self, out_features=rows, codes=self.codes[part], scales=self.scales[part], zeros=zeros
            )

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:  # [N, K]
        """The weight that the codes stand for, some panels at a time, since it goes through float32."""
        wanted = dtype or torch.float32
        strips = list(self.strips(_STRIP_ELEMENTS))
        if len(strips) == 1:
            return self._dequantized().to(wanted)
        made = self.scales.new_empty(self.shape, dtype=wanted)
        first = 0
        for strip in strips:
            made[first : first + strip.out_features] = strip._dequantized()
            first += strip.out_features
        return made

    def _dequantized(self) -> Tensor:  # [N, K] float32
        zero = self.spec.levels / 2 if self.zeros is None else self._by_row(self.zeros)
        return (self.unpack().float() - zero) * self._by_row(self.scales)

    def _by_row(self, values: Tensor) -> Tensor:  # [P, groups, 16] -> [N, K] float32
        rows = values.float().transpose(1, 2).flatten(0, 1)[: self.out_features]
        return rows.repeat_interleave(self.spec.group_size, dim=1)[:, : self.in_features]


def _to_panels(values: Tensor, panels: int) -> Tensor:  # [N, G] -> [P, G, 16]
    rows, groups = values.shape
    filled = values.new_zeros(panels * PANEL_ROWS, groups)
    filled[:rows] = values
    return filled.view(panels, PANEL_ROWS, groups).transpose(1, 2).contiguous()
