"""Names of methods, scores and choices, without importing torch: the command line shows them in its help."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["shortgpt", "finercut", "flattengpt"]
Score = Literal["auto", "block-influence", "relative-magnitude", "sequential", "reverse", "after-repair"]
Grouping = Literal["auto", "similarity", "after-repair"]
Selection = Literal["auto", "importance", "after-repair"]
Distance = Literal["js_reverse", "js", "kl", "angular", "norm", "perplexity"]
Kind = Literal["attention", "ffn"]
Repair = Literal["ridge", "none"]

METHODS: tuple[Method, ...] = get_args(Method)
SCORES: tuple[Score, ...] = get_args(Score)
RANKINGS = SCORES[1:-1]  # a score for every block; after-repair chooses spans instead
# With these the last block stays by default: the paper's script measures its influence after the final norm, which
# protects it. The paper's other orders protect nothing.
PROTECTED_SCORES: tuple[Score, ...] = ("block-influence", "after-repair")
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
SELECTIONS: tuple[Selection, ...] = get_args(Selection)
DISTANCES: tuple[Distance, ...] = get_args(Distance)
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order that they have in a block
REPAIRS: tuple[Repair, ...] = get_args(Repair)
