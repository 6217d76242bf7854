"""`PrunePlan`: what a pruning method decided, as pure data in the parent's numbering.

Decide, then do: a plan is known before any tensor is touched, is stored in the checkpoint, and one
function (`surgery.apply_plan`) carries it out. Sub-layers are always numbered as in the parent, also
when earlier edits removed some: lists that shift under removal are a classic defect of pruning scripts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import DecoderSpec, from_fields


@dataclass(frozen=True)
class Drop:
    """Remove one sub-layer: the residual stream passes through."""

    kind: ClassVar[str] = "drop"
    sublayer: int

    def __post_init__(self) -> None:
        if not isinstance(self.sublayer, int) or isinstance(self.sublayer, bool) or self.sublayer < 0:
            raise InputError(f"drop.sublayer: expected an integer >= 0, got {self.sublayer!r}")


Edit = Drop
_EDIT_TYPES: dict[str, type[Edit]] = {"drop": Drop}


@dataclass(frozen=True)
class PrunePlan:
    """The edits of one pruning run.

    method: name of the method; parent_digest: content digest of the dense parent
    (`Checkpoint.digest`); edits: in the parent's numbering; settings: everything needed to repeat the
    decision (calibration, scores, options), JSON values only.
    """

    method: str
    parent_digest: str
    edits: tuple[Edit, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def dropped(self) -> frozenset[int]:
        return frozenset(e.sublayer for e in self.edits)

    def check(self, parent: DecoderSpec) -> None:
        """Refuse a plan that does not fit `parent`."""
        seen: set[int] = set()
        for edit in self.edits:
            if not 0 <= edit.sublayer < len(parent.sublayers):
                raise InputError(
                    f"plan: drop of sub-layer {edit.sublayer}, but the parent has {len(parent.sublayers)} sub-layers"
                )
            if edit.sublayer in seen:
                raise InputError(f"plan: sub-layer {edit.sublayer} is dropped twice")
            seen.add(edit.sublayer)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["edits"] = [{"kind": e.kind, **dataclasses.asdict(e)} for e in self.edits]
        return data

    @classmethod
    def from_json(cls, data: object) -> PrunePlan:
        if not isinstance(data, dict) or not isinstance(data.get("edits"), list):
            raise InputError("plan: expected a JSON object with a list of edits")
        edits = []
        for i, edit in enumerate(data["edits"]):
            kind = edit.get("kind") if isinstance(edit, dict) else None
            if not isinstance(kind, str) or kind not in _EDIT_TYPES:
                raise InputError(f"plan.edits[{i}]: expected a kind out of {sorted(_EDIT_TYPES)}, got {kind!r}")
            fields = {k: v for k, v in edit.items() if k != "kind"}
            edits.append(from_fields(_EDIT_TYPES[kind], fields, f"plan.edits[{i}]"))
        return from_fields(cls, {**data, "edits": tuple(edits)}, "plan")
