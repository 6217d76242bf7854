"""Options of FlattenGPT. Imports no torch. `leverage_lam` 10 is printed in the paper; `benchmarks/tune.py` measures
others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from depthprune_runtime.options import check_choice, check_flags, check_number, flag
from depthprune_runtime.pruning.method import MethodOptions

Grouping = Literal["auto", "similarity", "after-repair"]
Selection = Literal["auto", "importance", "after-repair"]

GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
SELECTIONS: tuple[Selection, ...] = get_args(Selection)


@dataclass(frozen=True)
class FlattenGPTOptions(MethodOptions):
    """grouping: which blocks merge, by the paper's `similarity` of their inputs or by what a repair could not bring
    back; selection: which units stay, by the paper's `importance` or by the same; `auto` for both: after-repair if a
    repair follows, else the paper's. pairs_only: merge no more than two blocks; keep_width: 0 narrows to the original
    width, 1 leaves the merged block wide, between them the share of the difference that stays; compensate: re-solve
    down_proj for the channels that go (a repair does more and replaces it); leverage_lam: ridge of channel scores and
    compensation, relative to the mean of the Gram diagonal."""

    grouping: Grouping = field(
        default="auto", metadata=flag("which blocks merge; auto: after-repair if a repair follows")
    )
    selection: Selection = field(
        default="auto", metadata=flag("which units stay; auto: after-repair if a repair follows")
    )
    pairs_only: bool = field(default=False, metadata=flag("merge no more than two blocks"))
    keep_width: float = field(
        default=0.0,
        metadata=flag("0: original width (default), 1: as wide as merged", metavar="R", alias=("no-narrow", 1.0)),
    )
    compensate: bool = field(default=True, metadata=flag("re-solve down_proj for lost channels (default)"))
    leverage_lam: float = field(
        default=10.0, metadata=flag("ridge of channel scores, relative (default 10)", metavar="L")
    )

    def __post_init__(self) -> None:
        check_choice("grouping", self.grouping, GROUPINGS)
        check_choice("selection", self.selection, SELECTIONS)
        check_flags(self, "pairs_only", "compensate")
        check_number("keep_width", self.keep_width, 0.0, 1.0)
        check_number("leverage_lam", self.leverage_lam, 1e-9)
