"""`PrunePlan`: what a pruning method decided, as pure data in the parent's numbering.

Decide, then do: a plan is complete before a tensor is written, is stored in the checkpoint, and one function
(`surgery.layout`) says what it makes. Sub-layers are always numbered as in the parent, also when earlier
edits removed some: lists that shift under removal are a classic defect of pruning scripts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.fields import checked, from_fields
from depthprune_runtime.spec import DecoderSpec


def _indices(owner: str, name: str, values: object) -> None:
    """Strictly rising integers >= 0."""
    listed = values if isinstance(values, tuple) else ()
    good = bool(listed) and all(isinstance(v, int) and not isinstance(v, bool) for v in listed)
    if not good or listed[0] < 0 or any(a >= b for a, b in itertools.pairwise(listed)):
        raise InputError(f"{owner}.{name}: expected strictly rising integers >= 0, got {printable(repr(values))}")


@dataclass(frozen=True)
class Drop:
    """Remove one sub-layer: the residual stream passes through."""

    kind: ClassVar[Literal["drop"]] = "drop"
    sublayer: int

    def __post_init__(self) -> None:
        _indices("drop", "sublayer", (self.sublayer,))


@dataclass(frozen=True)
class Flatten:
    """Merge neighbouring blocks side by side: one wide attention, then one concatenated FFN."""

    kind: ClassVar[Literal["flatten"]] = "flatten"
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        _indices("flatten", "blocks", self.blocks)
        if len(self.blocks) < 2 or self.blocks[-1] - self.blocks[0] != len(self.blocks) - 1:
            raise InputError(f"flatten.blocks: expected two or more neighbours, got {printable(list(self.blocks))}")


@dataclass(frozen=True)
class Narrow:
    """Keep only some KV groups of an attention, or some channels of an FFN.

    sublayer: the parent's sub-layer, of a merged block the first; keep: indices into the concatenated KV
    groups or channels.
    """

    kind: ClassVar[Literal["narrow"]] = "narrow"
    sublayer: int
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        _indices("narrow", "sublayer", (self.sublayer,))
        _indices("narrow", "keep", self.keep)


@dataclass(frozen=True)
class Step:
    """One removal of a greedy search: its place in the order, the sub-layer in the parent's numbering, and the
    distance of the model without it.

    kind: attention or ffn; block: of the dense parent; evaluations: sub-layers run over the whole
    calibration set to decide it; plain_evaluations: what re-running the model for every candidate takes.
    """

    step: int
    sublayer: int
    kind: Literal["attention", "ffn"]
    block: int
    distance: float
    evaluations: float
    plain_evaluations: int

    def __post_init__(self) -> None:
        _indices("step", "step, sublayer, block", tuple(sorted({self.step, self.sublayer, self.block})))
        if not (math.isfinite(self.distance) and self.evaluations >= 0 and self.plain_evaluations >= 0):
            raise InputError("step: expected a finite distance and evaluations >= 0")


Edit = Drop | Flatten | Narrow
_EDIT_TYPES: dict[str, type[Drop] | type[Flatten] | type[Narrow]] = {
    "drop": Drop,
    "flatten": Flatten,
    "narrow": Narrow,
}


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

    def ranking(self) -> tuple[Step, ...]:
        """The order of removal with all distances, where the method searched for one."""
        listed = checked(tuple[Step, ...], self.settings.get("ranking", []), "plan.settings.ranking")
        return tuple(listed)

    def removal_order(self) -> tuple[int, ...]:
        """Blocks in the order in which they would go, where the method ranks them once."""
        return tuple(checked(tuple[int, ...], self.settings.get("removal_order") or [], "plan.settings.removal_order"))

    def dropped(self) -> frozenset[int]:
        return frozenset(e.sublayer for e in self.edits if isinstance(e, Drop))

    def flattened(self) -> tuple[Flatten, ...]:
        return tuple(e for e in self.edits if isinstance(e, Flatten))

    def narrowed(self) -> dict[int, tuple[int, ...]]:
        return {e.sublayer: e.keep for e in self.edits if isinstance(e, Narrow)}

    def check(self, parent: DecoderSpec) -> None:
        """Refuse a plan that does not fit `parent`."""
        count = len(parent.sublayers)
        taken: set[int] = set()

        def take(sublayer: int, what: str) -> None:
            if not 0 <= sublayer < count:
                raise InputError(f"plan: {what} of sub-layer {sublayer}, but the parent has {count} sub-layers")
            if sublayer in taken:
                raise InputError(f"plan: sub-layer {sublayer} is dropped twice or both dropped and merged")
            taken.add(sublayer)

        narrowed: set[int] = set()
        for edit in self.edits:
            if isinstance(edit, Drop):
                take(edit.sublayer, "drop")
            elif isinstance(edit, Flatten):
                blocks = parent.whole_blocks()
                if blocks is None:
                    raise InputError("plan: flatten needs a parent of whole blocks (attention, then FFN)")
                if edit.blocks[-1] >= len(blocks):
                    raise InputError(
                        f"plan: flatten of block {edit.blocks[-1]}, but the parent has {len(blocks)} blocks"
                    )
                for block in edit.blocks:
                    for sublayer in blocks[block]:
                        take(sublayer, "flatten")
            elif edit.sublayer >= count or edit.sublayer in narrowed:
                raise InputError(f"plan: sub-layer {edit.sublayer} is narrowed twice, or not in the parent")
            else:
                narrowed.add(edit.sublayer)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["edits"] = [
            {"kind": e.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(e).items()}}
            for e in self.edits
        ]
        return data

    @classmethod
    def from_json(cls, data: object) -> PrunePlan:
        """The plan in a checkpoint. Raises InputError for what no method writes."""
        if not isinstance(data, dict) or not isinstance(data.get("edits"), list | tuple):
            raise InputError("plan: expected a JSON object with a list of edits")
        edits = []
        for i, edit in enumerate(data["edits"]):
            kind = edit.get("kind") if isinstance(edit, dict) else None
            if not isinstance(kind, str) or kind not in _EDIT_TYPES:
                raise InputError(
                    f"plan.edits[{i}]: expected a kind out of {sorted(_EDIT_TYPES)}, got {printable(repr(kind))}"
                )
            fields = {k: v for k, v in edit.items() if k != "kind"}
            edits.append(from_fields(_EDIT_TYPES[kind], fields, f"plan.edits[{i}]"))
        plan = from_fields(cls, {**data, "edits": tuple(edits)}, "plan")
        plan.removal_order()
        if plan.ranking():
            checked(str, plan.settings.get("distance"), "plan.settings.distance")
        return plan
