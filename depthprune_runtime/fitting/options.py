"""Options of the closed-form repair, which pruning and quantisation share. Imports no torch.

Where the defaults come from: `lam` 0.05, `samples` 128 and `seq_len` 512 are from an early comparison by perplexity, of
which no rows are left. `benchmarks/tune.py` measures lam, samples and strength on rows that are not reported:
WikiText-2 valid, and rows 500 and later of the tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from depthprune_runtime.options import check_choice, check_count_or_none, check_number, flag

Repair = Literal["auto", "ridge", "none"]
Weighting = Literal["rms", "none"]
Answers = Literal["before", "after"]
Scope = Literal["all", "edited"]

REPAIRS: tuple[Repair, ...] = get_args(Repair)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
ANSWERS: tuple[Answers, ...] = get_args(Answers)
SCOPES: tuple[Scope, ...] = get_args(Scope)

REPAIR_WINDOWS = (128, 512)  # samples, seq_len


@dataclass(frozen=True)
class RepairOptions:
    """lam: ridge relative to the mean of the Gram diagonal; weighting: of the tokens; answers_for: whether a dropped
    sub-layer is answered for by the kept one before or after it; scope: which sub-layers are solved anew, all from the
    first edit on, or only those that were merged or answer for dropped ones; strength: share of every weight's change
    that is written, None: what suits the pruning method; samples, seq_len: windows of the walk, None: as many as
    the caller chose for scoring, else `REPAIR_WINDOWS`, fewer if the text has no more."""

    lam: float = field(default=0.05, metadata=flag("ridge, relative to the mean of the Gram diagonal", metavar="L"))
    weighting: Weighting = field(default="rms", metadata=flag("of the tokens"))
    answers_for: Answers = field(default="before", metadata=flag("who answers for a dropped sub-layer"))
    scope: Scope = field(default="all", metadata=flag("what is solved anew: all, or what the plan touches"))
    strength: float | None = field(
        default=None, metadata=flag("share of the change that is written (default: what suits the method)", metavar="S")
    )
    samples: int | None = field(
        default=None, metadata=flag("windows of the repair's walk (--samples, else 128)", metavar="N")
    )
    seq_len: int | None = field(default=None, metadata=flag("tokens in each (--seq-len, else 512)", metavar="S"))

    def __post_init__(self) -> None:
        check_number("repair lam", self.lam, 0.0)
        check_choice("repair weighting", self.weighting, WEIGHTINGS)
        check_choice("repair answers_for", self.answers_for, ANSWERS)
        check_choice("repair scope", self.scope, SCOPES)
        check_count_or_none("repair samples", self.samples)
        check_count_or_none("repair seq_len", self.seq_len)
        if self.strength is not None:
            check_number("repair strength", self.strength, 0.0, 1.0)

    def suited(self, strength: float) -> RepairOptions:
        """These options with a strength.

        Args:
            strength: what suits the method; it is taken where none was chosen.

        Returns:
            Options whose strength is decided.
        """
        return self if self.strength is not None else replace(self, strength=strength)
