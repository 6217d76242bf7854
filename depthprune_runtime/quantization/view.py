"""A checkpoint some of whose projections have been quantised, as a view of the one they come from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.pieces import Piece
from depthprune_runtime.fitting.states import TensorStore
from depthprune_runtime.weights.quantized import QuantizedWeight
from depthprune_runtime.weights.rows import Stored


class QuantizedCheckpoint(Checkpoint):
    """`parent` with the weights that were `put`; everything else, its plan included, is the parent's.

    settings: how they were quantised, for the provenance.
    """

    def __init__(self, parent: Checkpoint, settings: Mapping[str, Any]) -> None:
        self.name = f"{parent.name} quantised"
        self.spec = parent.spec
        self.dtype = parent.dtype
        self.plan = parent.plan
        self.source_files = parent.source_files
        self.provenance = {**parent.provenance, "quantization": dict(settings)}
        self.pieces = tuple(Piece((i,)) for i in range(len(parent.spec.sublayers)))  # what the walk asks of a student
        self._parent = parent
        self._quantized = dict(parent.quantization)
        self.quantization = MappingProxyType(self._quantized)
        self._store = TensorStore()

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._parent.assets

    def stored_checksum(self, entry: str) -> str | None:
        return None if entry in self._store.tensors else self._parent.stored_checksum(entry)

    def check_unchanged(self) -> None:
        self._parent.check_unchanged()

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Let weight `name` be `weight` from now on. Raises InputError if it came from weights that are not finite."""
        if not torch.isfinite(weight.scales).all():
            raise InputError(f"{self._parent.name}: expected finite weights, got infinite or NaN ones in {name}")
        for part, tensor in weight.parts().items():
            self._store.put(f"{name}.{part}", tensor.cpu())
        self._quantized[name] = weight.spec

    def weight(self, name: str) -> Stored:
        if f"{name}.codes" not in self._store.tensors:
            return self._parent.weight(name)
        quant = self._quantized[name]
        shape = self.spec.projections()[name]
        parts = {part: self._store.tensors[f"{name}.{part}"] for part in quant.shapes(*shape)}
        return QuantizedWeight.from_parts(quant, shape, parts)

    def tensor(self, name: str) -> Tensor:
        weight = self.weight(name)
        return weight if isinstance(weight, Tensor) else weight.dense(self.dtype)
