"""ShortGPT as a method: blocks by a score, or spans of blocks by what a repair cannot bring back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from depthprune_runtime.pruning.amount import Amount, block_pairs
from depthprune_runtime.pruning.method import Method, Task
from depthprune_runtime.pruning.shortgpt.options import PROTECTED_SCORES, ShortGPTOptions

if TYPE_CHECKING:
    from depthprune_runtime.plan import PrunePlan
    from depthprune_runtime.spec import DecoderSpec


class ShortGPT(Method[ShortGPTOptions]):
    name = "shortgpt"
    options = ShortGPTOptions

    def resolved(self, options: ShortGPTOptions, repairs: bool) -> ShortGPTOptions:
        if options.score == "auto":
            options = replace(options, score="after-repair" if repairs else "block-influence")
        if options.protect_last is None:
            options = replace(options, protect_last=options.score in PROTECTED_SCORES)
        return options

    def windows(self, options: ShortGPTOptions) -> tuple[int, int]:
        from depthprune_runtime.pruning.spans import WINDOWS

        return WINDOWS if options.score == "after-repair" else (128, 256)

    def check(self, amount: Amount, spec: DecoderSpec, options: ShortGPTOptions) -> None:
        from depthprune_runtime.pruning.spans import dropped_blocks, equal_errors

        blocks = amount.block_count(spec)
        if options.score == "after-repair":
            count = len(block_pairs(spec))
            dropped_blocks(equal_errors(count), count, blocks, bool(options.protect_last))

    def decide(self, task: Task, options: ShortGPTOptions) -> PrunePlan:
        from depthprune_runtime.pruning.shortgpt.ranking import plan_after_repair, plan_shortgpt

        parent, data, device = task.parent, task.calibration, task.device
        blocks, protect_last = task.amount.block_count(parent.spec), bool(options.protect_last)
        with task.progress.stage("score blocks", len(block_pairs(parent.spec))) as advance:
            if options.score == "after-repair":
                return plan_after_repair(parent, blocks, data, device, protect_last, task.digest, advance)
            return plan_shortgpt(
                parent, blocks, data, device, parent.dtype, options.score, protect_last, task.digest, advance
            )


METHOD = ShortGPT()
