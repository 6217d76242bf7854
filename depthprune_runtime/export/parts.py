"""Packed tensors taken apart into those that a target names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.checkpoint.container import TensorEntry
from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import Shape

Parts = Mapping[str, Mapping[str, Shape]]  # packed name -> name in the target -> shape there


def converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`. Raises InputError where values become infinite."""
    made = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not made.isfinite().all():
        raise InputError(f"{name}: its values overflow float16; give --dtype bf16 or fp32 (dtype=)")
    return made


def _split(tensor: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    if len(shapes) == 1:
        ((name, shape),) = shapes.items()
        return {name: tensor if tuple(tensor.shape) == shape else tensor[0]}  # one gain stands for all heads
    rows = tensor.split([shape[0] for shape in shapes.values()])
    return dict(zip(shapes, rows, strict=True))


class Unpacked:
    """The tensors of `checkpoint` under a target's names; one packed tensor is in memory at a time.

    dtype: of all; vectors: of those with one axis, by default the same; on_tensor: called for each packed tensor that
    is read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: Parts,
        dtype: torch.dtype,
        on_tensor: Callable[[], None],
        vectors: torch.dtype | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._on_tensor = on_tensor
        self._parts = parts
        self._home = {target: name for name, shapes in parts.items() for target in shapes}
        self._held: tuple[str, dict[str, Tensor]] = ("", {})
        self.entries = [
            TensorEntry(target, dtype if len(shape) > 1 or vectors is None else vectors, shape)
            for shapes in parts.values()
            for target, shape in shapes.items()
        ]
        self._dtypes = {entry.name: entry.dtype for entry in self.entries}

    def tensor(self, target: str) -> Tensor:
        """Tensor `target`, contiguous."""
        name = self._home[target]
        if self._held[0] != name:
            self._held = (name, _split(self._checkpoint.tensor(name), self._parts[name]))
            self._on_tensor()
        return converted(self._held[1][target], self._dtypes[target], name).contiguous()

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)
