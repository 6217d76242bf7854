"""Narrowing, compensation and repair in one walk over teacher and student."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.fitting import projection as repair
from depthprune_runtime.fitting.options import RepairOptions
from depthprune_runtime.fitting.states import TensorStore
from depthprune_runtime.fitting.walk import Visit, Walk
from depthprune_runtime.model.decoder import SublayerLoader
from depthprune_runtime.model.sublayers import Sublayer
from depthprune_runtime.progress import Advance
from depthprune_runtime.pruning.flattengpt import merging
from depthprune_runtime.pruning.flattengpt import units as narrowing
from depthprune_runtime.pruning.flattengpt.elimination import choose_after_repair
from depthprune_runtime.pruning.plan import Edit, Narrow, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint
from depthprune_runtime.spec import AttentionSpec, SublayerSpec


def output_name(spec: SublayerSpec) -> str:
    """Short name of the projection that a method may solve anew."""
    return "o_proj.weight" if isinstance(spec, AttentionSpec) else "down_proj.weight"


@dataclass(frozen=True)
class Narrowing:
    """How wide sub-layers are narrowed.

    units: first source -> units to keep; after_repair: keep those with which a repair does best, else the most
    important; compensate: re-solve down_proj for the channels that go, where no repair does; leverage_lam: ridge of the
    channels' importance and of the compensation, relative to the mean of the Gram diagonal.
    """

    units: Mapping[int, int]
    after_repair: bool = False
    compensate: bool = True
    leverage_lam: float = 10.0


class Rebuild:
    """Visitor of the walk that decides Narrow edits and solves output projections anew.

    plan: drops and flattens, decided before; narrowing, repair: None leaves that part out.
    """

    def __init__(
        self,
        parent: Checkpoint,
        plan: PrunePlan,
        narrowing: Narrowing | None,
        repair: RepairOptions | None,
        device: torch.device,
    ) -> None:
        self._parent = parent
        self._plan = plan
        self._narrowing = narrowing
        self._repair = repair
        self._device = device
        self._edits: list[Edit] = []
        self._store = TensorStore()

    def _checkpoint(self, instead: Mapping[str, Tensor] | None = None) -> PrunedCheckpoint:
        """The student so far; instead: weights that differ from those that will be written."""
        plan = dataclasses.replace(self._plan, edits=self._plan.edits + tuple(self._edits))
        return PrunedCheckpoint(self._parent, plan, {**self._store.tensors, **(instead or {})})

    def run(self, walk: Walk, advance: Advance = lambda: None) -> tuple[PrunedCheckpoint, PrunePlan]:
        """Walk to the end; the rebuilt student and its whole plan."""
        walk.run(self.visit, advance)
        return self._checkpoint(), dataclasses.replace(self._plan, edits=self._plan.edits + tuple(self._edits))

    def walk(self, windows: Tensor) -> Walk:  # [N, S] int64
        """The walk that `run` takes."""
        answers_for = self._repair.answers_for if self._repair is not None else "before"
        student = PrunedCheckpoint(self._parent, self._plan)
        return Walk(self._parent, student, windows, self._device, self._parent.dtype, answers_for)

    def visit(self, visit: Visit) -> Sublayer:
        """Narrow and repair one sub-layer; the student goes on with the result at full strength, rounded as stored."""
        units = self._narrowing.units.get(visit.piece.sources[0]) if self._narrowing is not None else None
        if units is None and (self._repair is None or (self._repair.scope == "edited" and not visit.edited)):
            return visit.sublayer
        weighting = self._repair.weighting if self._repair is not None else "none"
        moments = repair.accumulate(visit, weighting)
        spec, wide = visit.sublayer.spec, visit.sublayer.output_weight
        name = f"sublayers.{visit.index}.{output_name(spec)}"
        columns, solved = None, None
        ahead: dict[str, Tensor] = {}
        if units is not None and self._narrowing is not None:
            options = self._narrowing
            if options.after_repair:
                assert self._repair is not None
                keep = choose_after_repair(moments, wide, spec, units, self._repair.lam)
            else:
                keep = narrowing.choose_units(moments.gram, wide, spec, units, options.leverage_lam)
            self._edits.append(Narrow(visit.piece.sources[0], keep))
            columns = merging.unit_columns(spec, keep).to(self._device)
            if self._repair is None and options.compensate and not isinstance(spec, AttentionSpec):
                solved = narrowing.compensated(moments.gram, wide, columns, options.leverage_lam)
        if self._repair is not None:
            initial = wide if columns is None else wide[:, columns]
            whole = repair.solve(moments, initial, columns, self._repair.lam)
            solved = repair.weakened(initial, whole, self._repair.strength)
            if solved is not whole:
                ahead[name] = self._stored(whole)
        if solved is not None:
            self._store.put(name, self._stored(solved))
        checkpoint = self._checkpoint(ahead)
        return SublayerLoader(checkpoint.spec, checkpoint.tensor, self._device, self._parent.dtype).sublayer(
            visit.index
        )

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.to(device="cpu", dtype=self._parent.dtype)
