"""A checkpoint some of whose projections have been quantised, as a view of the one they come from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.checkpoint.stored import dense, part_entries
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.pieces import Piece
from depthprune_runtime.fitting.states import TensorStore
from depthprune_runtime.weights.quantized import QuantizedWeight


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
        for entry in part_entries(name, weight.spec, *weight.shape):
            self._store.put(entry.name, getattr(weight, entry.name.rpartition(".")[2]).cpu())
        self._quantized[name] = weight.spec

    def weight(self, name: str) -> Tensor | QuantizedWeight:
        if f"{name}.codes" not in self._store.tensors:
            return self._parent.weight(name)
        quant = self._quantized[name]
        rows, columns = self.spec.projections()[name]
        parts = {part: self._store.tensors[f"{name}.{part}"] for part in quant.shapes(rows, columns)}
        return QuantizedWeight(quant, rows, columns, parts["codes"], parts["scales"], parts.get("zeros"))

    def tensor(self, name: str) -> Tensor:
        weight = self.weight(name)
        return weight if isinstance(weight, Tensor) else dense(weight, self.dtype)
