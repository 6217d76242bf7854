"""What a case of an op is: a name, and how to draw its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Draw:
    """Reproducible random tensors of one dtype."""

    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *shape: int, scale: float = 1.0, outlier: bool = False) -> Tensor:
        """outlier: one channel is a thousand times larger."""
        values = torch.randn(*shape, generator=self.generator) * scale
        if outlier:
            values[..., shape[-1] // 3] *= 1000
        return values.to(self.dtype)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    build: Callable[[Draw], Arguments]

    def arguments(self, dtype: torch.dtype) -> Arguments:
        return self.build(Draw(dtype, torch.Generator().manual_seed(0)))

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def named_cases(
    op: str, build: Callable[..., Callable[[Draw], Arguments]], *small: Any, big: Sequence[Any] = ()
) -> list[Case]:
    """One a tuple of arguments of `build`; `big` ones have it in their name, so that `-k "not big"` leaves them out."""
    named = [("", shape) for shape in small] + [("big-", shape) for shape in big]
    return [Case(op, prefix + "x".join(map(str, shape)).replace(" ", ""), build(*shape)) for prefix, shape in named]
