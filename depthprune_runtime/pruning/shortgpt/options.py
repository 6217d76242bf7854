"""Options of ShortGPT. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from depthprune_runtime.options import check_choice, check_flags, flag
from depthprune_runtime.pruning.method import MethodOptions

Score = Literal["auto", "block-influence", "relative-magnitude", "sequential", "reverse", "after-repair"]

SCORES: tuple[Score, ...] = get_args(Score)
RANKINGS = SCORES[1:-1]  # a score for every block; after-repair chooses spans instead
# With these the last block stays by default: the paper's script measures its influence after the final norm, which
# protects it. The paper's other orders protect nothing.
PROTECTED_SCORES: tuple[Score, ...] = ("block-influence", "after-repair")


@dataclass(frozen=True)
class ShortGPTOptions(MethodOptions):
    """score: how blocks are chosen, `auto`: after-repair if a repair follows, else the paper's block-influence;
    protect_last: never drop the last block; None: only with the scores of `PROTECTED_SCORES`, as in the paper."""

    score: Score = field(default="auto", metadata=flag("how blocks are chosen; auto: after-repair if a repair follows"))
    protect_last: bool | None = field(
        default=None, metadata=flag("never drop the last block (default: as suits the score)")
    )

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        if self.protect_last is not None:
            check_flags(self, "protect_last")
