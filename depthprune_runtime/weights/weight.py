"""`Weight`: all that the model, the ops and a checkpoint ask of the weight of a projection or an embedding."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor


class Format(enum.IntEnum):
    """How a weight lies in memory.

    The numbers are those that kernels take: `Format` in csrc/cpu/step/builder.h, `ROWS` and `CODES` in
    kernels/packed.py.
    """

    ROWS = 0  # [N, K] in the dtype of the model
    PANELS = 1  # bfloat16, see `weights.panels`
    CODES = 2  # 8 or 4 bits, see `weights.quantized`


class Weight(Protocol):
    """A weight [N, K], immutable, in any format."""

    @property
    def format(self) -> Format: ...

    @property
    def out_features(self) -> int: ...  # N

    @property
    def in_features(self) -> int: ...  # K

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def precision(self) -> tuple[int, int]:
        """(bits of a code, inputs that share a scale); zeros where there are no codes."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether kernels may round the inputs that this weight meets to 8 bits. Only those of codes do so."""

    def parts(self) -> Mapping[str, Tensor]:
        """The tensors that a kernel or a checkpoint gets, in order."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:  # [T] int64 -> [T, K]
        """Rows `ids` in `dtype`, the lookup of an embedding."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:  # [N, K]
        """The weight as plain rows in `dtype`; None: that of its numbers, float32 for codes. May share memory."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Weight:
        """The same weight with every part replaced by `function` of it."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Weight:
        """The same weight on `device`, its rows in `dtype`; no copy where it already is."""

    def with_inputs_rounded(self, allowed: bool) -> Weight:
        """The same weight with `rounds_inputs` as said; itself where no kernel rounds them."""
