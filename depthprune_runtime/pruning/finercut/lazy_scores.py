"""FinerCut's `fast` search: lazy-greedy scores of the most promising candidates.

A candidate's last known increment is the estimate of what it would add now. Each step re-scores the four lowest
estimates and the neighbours of the sub-layer that went last, whose increments change most, then further ones in
the order of estimates until the best beats the next estimate, reduced by a margin. Increments are taken where
independent removals add up: of the square of `angular` and `norm` (errors add in quadrature), the logarithm of
`perplexity`, and the divergences as they are. A candidate seen for the first time is estimated on a fifth of the
windows.
"""

from __future__ import annotations

import bisect
import math

from depthprune_runtime.pruning.finercut.candidates import CandidateScorer
from depthprune_runtime.pruning.finercut.state import SearchState

_BATCH = 4  # candidates re-scored together; they share their suffix
_OPTIMISM = 0.7  # of an old increment: what it may have shrunk to since
_NEIGHBOURS = 3  # remaining sub-layers before and after the last removed one that are always re-scored
_SHARE = 0.25  # of the candidates, at most, are re-scored in one step beside those
_ROUGH_SHARE = 0.2  # of the windows give the first estimate of a candidate
_ROUGH_LEAST = 8  # candidates without an estimate for which that pays


def additive(distance: str, value: float) -> float:
    """A growing function of `value` to which removals add roughly independently: see the module's docstring."""
    if distance in ("angular", "norm"):
        return value * value
    return math.log(value) if distance == "perplexity" else value


def lazy_scores(scorer: CandidateScorer, state: SearchState, allowed: list[int], base: float) -> dict[int, float]:
    """Distances of the most promising of `allowed`; `base` is the distance of the current model."""
    name = state.key.distance
    increments = state.increments
    level = additive(name, base)
    new = [i for i in allowed if i not in increments]
    rough = math.ceil(_ROUGH_SHARE * scorer.windows)
    # The perplexity of other windows is another number; errors of the output are averages over windows.
    if len(new) >= _ROUGH_LEAST and rough < scorer.windows and name != "perplexity":
        increments.update({i: additive(name, d) - level for i, d in scorer.score(new, rough).items()})
    queue = sorted((i for i in allowed if i in increments), key=lambda i: (increments[i], i))
    first = {i for i in allowed if i not in increments} | set(queue[:_BATCH])
    if state.steps:
        place = bisect.bisect(scorer.remaining, state.steps[-1].sublayer)
        first |= set(scorer.remaining[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]) & set(allowed)
    scores = scorer.score(sorted(first))
    queue = [i for i in queue if i not in first]
    cap = math.ceil(_SHARE * len(allowed))
    while queue and cap > 0:
        if additive(name, min(scores.values())) <= level + _OPTIMISM * increments[queue[0]]:
            break
        batch, queue, cap = queue[:_BATCH], queue[_BATCH:], cap - _BATCH
        scores.update(scorer.score(batch))
    increments.update({i: additive(name, d) - level for i, d in scores.items()})
    return scores
