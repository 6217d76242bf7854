"""Plans that no method decides: those of a file, replayed or written by hand, and layers named by hand.

    --plan FILE.json            the plan that `inspect --json` shows, or an object with edits alone
    --drop 21-28,5.attention    blocks, and single sub-layers, in the numbering of the model that is pruned

Such a plan takes the place of a method in `prune`: surgery, repair and writing follow it as ever.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.paths import source_path
from depthprune_runtime.plan import Drop, PrunePlan
from depthprune_runtime.pruning.amount import Amount
from depthprune_runtime.pruning.method import METHODS, Method, MethodOptions, Task, load_method

if TYPE_CHECKING:
    from depthprune_runtime.spec import DecoderSpec

BY_HAND = "by-hand"
_KINDS = ("attention", "ffn")  # in the order that they have in a block
_ITEM = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?(?:\.(attention|ffn))?", re.ASCII)
_MAX_BYTES = 1 << 26  # of a plan in a file; one that narrows every FFN of a large model takes some megabytes
PlanSource = PrunePlan | str | Path


@dataclass(frozen=True)
class ByHandOptions(MethodOptions):
    """plan: as it was given, an empty digest where it names no parent; drop: blocks and sub-layers, as in `--drop`."""

    plan: PrunePlan | None = None
    drop: str | None = None

    def planned(self, spec: DecoderSpec) -> PrunePlan:
        """The plan for a model of `spec`. Raises InputError where it does not fit."""
        from depthprune_runtime.pruning.surgery import pruned_spec

        plan = self.plan
        if plan is None:
            assert self.drop is not None
            plan = PrunePlan(BY_HAND, "", parse_drop(self.drop, spec), {"drop": self.drop})
        pruned_spec(spec, plan)
        return plan


def parse_drop(text: str, spec: DecoderSpec) -> tuple[Drop, ...]:
    """Drops of the blocks and sub-layers that `text` names. Raises InputError for what `spec` does not have.

    text: items between commas: `7` a block, `21-28` a range, `5.attention` and `7-9.ffn` one half of them.
    """
    blocks = spec.whole_blocks()
    if blocks is None:
        raise InputError(
            "drop: this model has lost single sub-layers, so its blocks have no numbers; give a plan with the numbers "
            "of sub-layers that inspect lists"
        )
    gone: list[int] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise InputError(
                f"drop: expected blocks such as 21-28, or sub-layers such as 5.attention, got {printable(item)!r}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < len(blocks):
            raise InputError(f"drop: expected blocks from 0 to {len(blocks) - 1}, got {printable(item.strip())}")
        halves = [0, 1] if match[3] is None else [_KINDS.index(match[3])]
        for block in range(first, last + 1):
            for half in halves:
                if blocks[block][half] in gone:
                    raise InputError(f"drop: the {_KINDS[half]} of block {block} is named twice")
                gone.append(blocks[block][half])
    return tuple(map(Drop, sorted(gone)))


def read_plan(source: PlanSource) -> PrunePlan:
    """The plan at `source`: a plan, an object with `edits` alone, or what `inspect --json` prints of a pruned file.

    Raises InputError where there is none.
    """
    if isinstance(source, PrunePlan):
        return source
    from depthprune_runtime.checkpoint.gate import read_object

    path = source_path(source, "plan")
    if not path.is_file():
        raise InputError(f"plan {printable(path, 1000)}: no such file")
    data = read_object(path, _MAX_BYTES)
    if "edits" not in data and "plan" in data:
        data = data["plan"]
    if not isinstance(data, dict) or "edits" not in data:
        raise InputError(
            f"plan {printable(path, 1000)}: expected an object with edits, or what inspect --json says of a pruned file"
        )
    try:
        return PrunePlan.from_json({"method": BY_HAND, "parent_digest": "", **data})
    except InputError as error:
        raise InputError(f"plan {printable(path, 1000)}: {error}") from error


class ByHand(Method[ByHandOptions]):
    """Decides nothing: the plan is there. A repair is as strong as suits the method that made it."""

    name = BY_HAND
    options = ByHandOptions
    single_sublayers = True

    def __init__(self, strength: float = 1.0) -> None:
        self.repair_strength = strength

    def windows(self, options: ByHandOptions) -> None:
        return None

    def check(self, amount: Amount, spec: DecoderSpec, options: ByHandOptions) -> None:
        options.planned(spec)

    def decide(self, task: Task, options: ByHandOptions) -> PrunePlan:
        plan = options.planned(task.parent.spec)
        if plan.parent_digest not in ("", task.digest):
            raise InputError(
                f"plan: it was made for another model, of digest {printable(plan.parent_digest, 16)}; "
                f"{task.parent.name} has {printable(task.digest, 16)}; give the plan's parent, or remove parent_digest "
                "from the plan"
            )
        kept = {name: value for name, value in plan.settings.items() if name not in ("repair", "narrowing")}
        return replace(plan, parent_digest=task.digest, settings=kept)


def by_hand(
    plan: PlanSource | None, drop: str | None, amount: Amount, method: str | None, options: MethodOptions | None
) -> tuple[Method[Any], MethodOptions] | None:
    """What stands for a method where `plan` or `drop` is given; None where neither is.

    Raises InputError for both, and for anything beside them that says what goes.
    """
    if plan is None and drop is None:
        return None
    others = {**vars(amount), "method": method, "options": options, "drop": None if plan is None else drop}
    given = ", ".join(name for name, value in others.items() if value is not None)
    if given:
        raise InputError(f"{'drop' if plan is None else 'plan'}: it says all that goes; leave out {given}")
    if drop is not None and not isinstance(drop, str):
        raise InputError(f"drop: expected a text such as 21-28, got {printable(repr(drop))}")
    read = None if plan is None else read_plan(plan)
    known = read is not None and read.method in METHODS
    strength = load_method(read.method).repair_strength if read is not None and known else 1.0
    return ByHand(strength), ByHandOptions(read, drop)
