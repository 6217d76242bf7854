"""FinerCut as a method: single sub-layers by a greedy search.

`repair_strength` is below 1 because the search does not know that a repair follows: the whole change costs zero-shot
accuracy where much is dropped. 0.6 is the least of 0.4, 0.6, 0.8 and 1 that keeps the perplexity of WikiText-2 valid
of the whole change, at 6 and at 9 of 30 blocks fewer (SmolLM2-135M-Instruct; benchmarks/results/tuning.csv). It was
first chosen on zero-shot rows that are reported; the rows of the file are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from depthprune_runtime.pruning.amount import Amount
from depthprune_runtime.pruning.finercut.goal import goal_of, removable_sublayers
from depthprune_runtime.pruning.finercut.options import FinerCutOptions
from depthprune_runtime.pruning.method import Method, Task

if TYPE_CHECKING:
    from depthprune_runtime.plan import PrunePlan
    from depthprune_runtime.spec import DecoderSpec


class FinerCut(Method[FinerCutOptions]):
    name = "finercut"
    options = FinerCutOptions
    single_sublayers = True
    repair_strength = 0.6

    def windows(self, options: FinerCutOptions) -> tuple[int, int]:
        return 10, 256  # as in the official script

    def check(self, amount: Amount, spec: DecoderSpec, options: FinerCutOptions) -> None:
        goal_of(amount, spec).most_steps(spec, removable_sublayers(spec, options.front_protection, options.only))

    def decide(self, task: Task, options: FinerCutOptions) -> PrunePlan:
        from depthprune_runtime.pruning.finercut.search import plan_finercut

        return plan_finercut(
            task.parent,
            goal_of(task.amount, task.parent.spec),
            task.calibration,
            task.device,
            task.parent.dtype,
            distance=options.distance,
            front_protection=options.front_protection,
            mode="fast" if options.fast else "exact",
            only=options.only,
            state_file=Path(options.state_file) if options.state_file else None,
            parent_digest=task.digest,
            progress=task.progress,
        )


METHOD = FinerCut()
