"""Options of FinerCut. Imports no torch.

Where the defaults come from: `distance` js_reverse is in the official configs of Llama-3 and Mixtral;
`front_protection` 0.4 in the command of its README, while the script's own default is 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from depthprune_runtime.options import check_choice, check_flags, check_number, flag
from depthprune_runtime.pruning.method import MethodOptions

Distance = Literal["js_reverse", "js", "kl", "angular", "norm", "perplexity"]
Kind = Literal["attention", "ffn"]

DISTANCES: tuple[Distance, ...] = get_args(Distance)
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order that they have in a block


@dataclass(frozen=True)
class FinerCutOptions(MethodOptions):
    """distance: between dense and pruned outputs; front_protection: share of the front that goes last; fast: lazy
    re-scoring; only: the one kind of sub-layers that may go, None: both; state_file: where the search is saved after
    every step, to be resumed from."""

    distance: Distance = field(
        default="js_reverse", metadata=flag("between dense and pruned outputs (default js_reverse)")
    )
    front_protection: float = field(default=0.4, metadata=flag("share of the front that goes last (0.4)", metavar="P"))
    fast: bool = field(default=False, metadata=flag("re-score only the most promising candidates"))
    only: Kind | None = field(default=None, metadata=flag("drop sub-layers of this kind only"))
    state_file: str | None = field(
        default=None,
        metadata=flag(
            "save the search here after every step, and resume it from here", name="state", metavar="FILE", writes=True
        ),
    )

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, DISTANCES)
        check_flags(self, "fast")
        check_number("front_protection", self.front_protection, 0.0, 1.0)
        if self.only is not None:
            check_choice("only", self.only, KINDS)
