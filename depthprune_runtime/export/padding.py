"""A model with sub-layers, FFN units and biases that add nothing: what some targets ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.spec import DecoderSpec, FFNSpec, SublayerSpec


@dataclass(frozen=True)
class Slot:
    """One sub-layer of the padded model. source: the sub-layer that it is; None where its weights are zero."""

    spec: SublayerSpec
    source: int | None


class PaddedCheckpoint(Checkpoint):
    """`checkpoint` with the sub-layers of `slots`, which may have wider FFNs and more biases than their sources."""

    def __init__(self, checkpoint: Checkpoint, slots: Sequence[Slot]) -> None:
        self.name, self.dtype = checkpoint.name, checkpoint.dtype
        self.provenance, self.plan = checkpoint.provenance, checkpoint.plan
        self.source_files, self.watched = checkpoint.source_files, checkpoint.watched
        self.spec = padded_spec(checkpoint.spec, slots)
        self._checkpoint = checkpoint
        self._slots = slots
        self._shapes = self.spec.tensor_shapes()
        self._stored = checkpoint.spec.tensor_shapes()

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._checkpoint.assets

    def tensor(self, name: str) -> Tensor:
        if not name.startswith("sublayers."):
            return self._checkpoint.tensor(name)
        _, index, short = name.split(".", 2)
        slot = self._slots[int(index)]
        source = f"sublayers.{slot.source}.{short}"
        if slot.source is None or source not in self._stored:
            return torch.zeros(self._shapes[name], dtype=self.dtype)
        tensor = self._checkpoint.tensor(source)
        if not isinstance(slot.spec, FFNSpec) or tuple(tensor.shape) == self._shapes[name]:
            return tensor
        made = torch.zeros(self._shapes[name], dtype=tensor.dtype)
        if short == "down_proj.weight":
            made[:, : tensor.shape[1]] = tensor
        else:  # gates, then ups
            halves = zip(made.chunk(2), tensor.chunk(2), strict=True)
            for wide, narrow in halves:
                wide[: narrow.shape[0]] = narrow
        return made


def padded_spec(spec: DecoderSpec, slots: Sequence[Slot]) -> DecoderSpec:
    """`spec` with the sub-layers of `slots`."""
    return dataclasses.replace(spec, sublayers=tuple(slot.spec for slot in slots))
