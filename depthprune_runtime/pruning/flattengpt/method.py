"""FlattenGPT as a method: neighbouring blocks are merged side by side, then narrowed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from depthprune_runtime.errors import InputError
from depthprune_runtime.pruning.amount import Amount, block_pairs
from depthprune_runtime.pruning.flattengpt.options import FlattenGPTOptions
from depthprune_runtime.pruning.method import Method, Task

if TYPE_CHECKING:
    from depthprune_runtime.plan import PrunePlan
    from depthprune_runtime.pruning.rebuild import Narrowing
    from depthprune_runtime.spec import DecoderSpec


def _merges(amount: Amount, spec: DecoderSpec, options: FlattenGPTOptions) -> int:
    return amount.block_count(spec, 1.0 - options.keep_width)


class FlattenGPT(Method[FlattenGPTOptions]):
    name = "flattengpt"
    options = FlattenGPTOptions

    def resolved(self, options: FlattenGPTOptions, repairs: bool) -> FlattenGPTOptions:
        if not repairs and options.selection == "after-repair":
            raise InputError("selection: after-repair needs a repair; give repair ridge, or selection importance")
        if options.grouping == "auto":
            options = replace(options, grouping="after-repair" if repairs else "similarity")
        if options.selection == "auto":
            options = replace(options, selection="after-repair" if repairs else "importance")
        return options

    def windows(self, options: FlattenGPTOptions) -> tuple[int, int]:
        from depthprune_runtime.pruning.spans import WINDOWS

        return WINDOWS if options.grouping == "after-repair" else (64, 512)

    def check(self, amount: Amount, spec: DecoderSpec, options: FlattenGPTOptions) -> None:
        from depthprune_runtime.pruning.flattengpt.grouping import check_merges
        from depthprune_runtime.pruning.flattengpt.merging import check_mergeable

        for sublayer in spec.sublayers:
            check_mergeable(sublayer)
        check_merges(len(block_pairs(spec)), _merges(amount, spec, options), options)

    def decide(self, task: Task, options: FlattenGPTOptions) -> PrunePlan:
        from depthprune_runtime.pruning.flattengpt.grouping import plan_flattengpt

        spec = task.parent.spec
        with task.progress.stage("score blocks", len(block_pairs(spec))) as advance:
            merges = _merges(task.amount, spec, options)
            return plan_flattengpt(task.parent, merges, task.calibration, task.device, options, task.digest, advance)

    def narrows(self, options: FlattenGPTOptions) -> bool:
        return options.keep_width < 1.0

    def narrowing(self, parent: DecoderSpec, plan: PrunePlan, options: FlattenGPTOptions) -> Narrowing | None:
        from depthprune_runtime.pruning.flattengpt.units import kept_units
        from depthprune_runtime.pruning.rebuild import Narrowing

        units = kept_units(parent, plan, options.keep_width)
        if not units:
            return None
        return Narrowing(units, options.selection == "after-repair", options.compensate, options.leverage_lam)


METHOD = FlattenGPT()
