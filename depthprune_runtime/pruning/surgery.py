"""Carry out a `PrunePlan`: a pruned view of the parent, computed tensor by tensor when asked.

Nothing is copied until it is written, so models larger than memory can be pruned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.pruning.plan import PrunePlan
from depthprune_runtime.spec import DecoderSpec


def pruned_spec(parent: DecoderSpec, plan: PrunePlan) -> DecoderSpec:
    """Spec of the model that `plan` leaves of `parent`."""
    plan.check(parent)
    dropped = plan.dropped()
    kept = tuple(s for i, s in enumerate(parent.sublayers) if i not in dropped)
    if not kept:
        raise InputError("plan: it drops every sub-layer")
    return dataclasses.replace(parent, sublayers=kept)


class PrunedCheckpoint(Checkpoint):
    """What `plan` leaves of `parent`, as a checkpoint of its own."""

    def __init__(self, parent: Checkpoint, plan: PrunePlan) -> None:
        if parent.plan is not None:
            raise InputError(
                f"{parent.name}: expected a dense model, got one already pruned by {parent.plan.get('method')}; "
                "prune its dense parent"
            )
        self.name = f"{parent.name} pruned by {plan.method}"
        self.spec = pruned_spec(parent.spec, plan)
        self.dtype = parent.dtype
        self.plan = plan.to_json()
        self.provenance = parent.provenance
        self._parent = parent
        dropped = plan.dropped()
        self._origin = [i for i in range(len(parent.spec.sublayers)) if i not in dropped]

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._parent.assets

    def tensor(self, name: str) -> Tensor:
        if not name.startswith("sublayers."):
            return self._parent.tensor(name)
        _, index, short = name.split(".", 2)
        return self._parent.tensor(f"sublayers.{self._origin[int(index)]}.{short}")
