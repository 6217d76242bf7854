"""Options of every method and of the repair: frozen, validated, with their defaults. Imports no torch.

Where the defaults come from:

- `distance` js_reverse: the official FinerCut configs of Llama-3 and Mixtral. `front_protection` 0.4: the command in
  its README; the script's own default is 0.0.
- `leverage_lam` 10: printed in the FlattenGPT paper.
- repair `lam` 0.05, `samples` 128 and `seq_len` 512: an early comparison by perplexity, of which no rows are left.
- repair `strength` 0.6 for FinerCut: the least of 0.4, 0.6, 0.8 and 1 that keeps the perplexity of WikiText-2 valid of
  the whole change, at 6 and at 9 of 30 blocks fewer (SmolLM2-135M-Instruct; benchmarks/results/tuning.csv). It was
  first chosen on zero-shot rows that are reported; the rows of the file are not. 1 for the others.

`benchmarks/tune.py` measures lam, samples, leverage_lam and strength on rows that are not reported: WikiText-2 valid,
and rows 500 and later of the tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from depthprune_runtime.errors import InputError
from depthprune_runtime.options import check_choice, check_flags, check_number
from depthprune_runtime.pruning.names import (
    DISTANCES,
    GROUPINGS,
    KINDS,
    PROTECTED_SCORES,
    SCORES,
    SELECTIONS,
    Distance,
    Grouping,
    Kind,
    Score,
    Selection,
)


@dataclass(frozen=True)
class ShortGPTOptions:
    """score: how blocks are chosen, `auto`: after-repair if a repair follows, else the paper's block-influence;
    protect_last: never drop the last block; None: only with the scores of `names.PROTECTED_SCORES`, as in the paper."""

    score: Score = "auto"
    protect_last: bool | None = None

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        if self.protect_last is not None:
            check_flags(self, "protect_last")


@dataclass(frozen=True)
class FinerCutOptions:
    """distance: between dense and pruned outputs; front_protection: share of the front that goes last; fast: lazy
    re-scoring; only: the one kind of sub-layers that may go, None: both; state_file: where the search is saved after
    every step, to be resumed from."""

    distance: Distance = "js_reverse"
    front_protection: float = 0.4
    fast: bool = False
    only: Kind | None = None
    state_file: str | None = None

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, DISTANCES)
        check_flags(self, "fast")
        check_number("front_protection", self.front_protection, 0.0, 1.0)
        if self.only is not None:
            check_choice("only", self.only, KINDS)


@dataclass(frozen=True)
class FlattenGPTOptions:
    """grouping: which blocks merge, by the paper's `similarity` of their inputs or by what a repair could not bring
    back; selection: which units stay, by the paper's `importance` or by the same; `auto` for both: after-repair if a
    repair follows, else the paper's. pairs_only: merge no more than two blocks; keep_width: 0 narrows to the original
    width, 1 leaves the merged block wide, between them the share of the difference that stays; compensate: re-solve
    down_proj for the channels that go (a repair does more and replaces it); leverage_lam: ridge of channel scores and
    compensation, relative to the mean of the Gram diagonal."""

    grouping: Grouping = "auto"
    selection: Selection = "auto"
    pairs_only: bool = False
    keep_width: float = 0.0
    compensate: bool = True
    leverage_lam: float = 10.0

    def __post_init__(self) -> None:
        check_choice("grouping", self.grouping, GROUPINGS)
        check_choice("selection", self.selection, SELECTIONS)
        check_flags(self, "pairs_only", "compensate")
        check_number("keep_width", self.keep_width, 0.0, 1.0)
        check_number("leverage_lam", self.leverage_lam, 1e-9)


# FinerCut does not know that a repair follows; the whole change costs zero-shot accuracy where it drops much. So the
# least that keeps the perplexity of WikiText-2 valid; see the module's docstring for the rows.
STRENGTHS: dict[str, float] = {"shortgpt": 1.0, "finercut": 0.6, "flattengpt": 1.0}

MethodOptions = ShortGPTOptions | FinerCutOptions | FlattenGPTOptions
METHOD_OPTIONS: dict[str, type[ShortGPTOptions] | type[FinerCutOptions] | type[FlattenGPTOptions]] = {
    "shortgpt": ShortGPTOptions,
    "finercut": FinerCutOptions,
    "flattengpt": FlattenGPTOptions,
}


def resolved(options: MethodOptions, repair: bool) -> MethodOptions:
    """`options` with all that is open decided. Raises InputError for a choice that only a repair makes sense of."""
    choice: dict[str, Any] = {
        "score": "after-repair" if repair else "block-influence",
        "grouping": "after-repair" if repair else "similarity",
        "selection": "after-repair" if repair else "importance",
    }
    found = {name: value for name, value in choice.items() if getattr(options, name, None) == "auto"}
    if not repair and getattr(options, "selection", None) == "after-repair":
        raise InputError("selection: after-repair needs a repair; give repair ridge, or selection importance")
    options = replace(options, **found)
    if isinstance(options, ShortGPTOptions) and options.protect_last is None:
        return replace(options, protect_last=options.score in PROTECTED_SCORES)
    return options


def method_options(method: str, values: dict[str, Any]) -> MethodOptions:
    """Options object of `method`; unknown names are refused."""
    kind = METHOD_OPTIONS.get(method)
    if kind is None:
        raise InputError(f"method: expected one of {', '.join(METHOD_OPTIONS)}, got {method!r}")
    known = set(kind.__dataclass_fields__)
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"method {method}: unknown options {unknown}; known are {sorted(known)}")
    return kind(**values)
