"""Which candidates the fast search re-scores, told by a scorer that knows all distances beforehand."""

from __future__ import annotations

import math

import pytest

from depthprune_runtime.pruning.finercut.lazy_scores import additive, lazy_scores
from depthprune_runtime.pruning.finercut.state import SearchKey, SearchState, Step


class Scorer:
    """Distances by candidate; remembers what was asked."""

    def __init__(self, distances, windows=10):
        self.distances, self.windows, self.remaining, self.asked = distances, windows, sorted(distances), []

    def score(self, candidates, windows=None):
        self.asked.append((list(candidates), windows))
        return {i: self.distances[i] for i in candidates}

    def scored(self):
        """Candidates scored on all windows, in order."""
        return [i for candidates, windows in self.asked if windows is None for i in candidates]


def state(increments=None, last=None, distance="kl"):
    key = SearchKey("digest", "tokens", distance, 0.0, "fast", "float32")
    steps = [] if last is None else [Step(1, last, "ffn", last // 2, 0.0, 0, 0)]
    return SearchState(key, steps, dict(increments or {}))


@pytest.mark.parametrize(
    ("distance", "value", "expected"),
    [("norm", 3.0, 9.0), ("angular", 0.5, 0.25), ("perplexity", math.e**2, 2.0)]
    + [(name, 0.3, 0.3) for name in ("kl", "js", "js_reverse")],
)
def test_what_adds_up(distance, value, expected):
    """Errors in quadrature; perplexity as its logarithm; divergences as they are."""
    assert additive(distance, value) == pytest.approx(expected)


def test_new_candidates_are_estimated_on_a_fifth_of_the_windows():
    """Then the four lowest estimates are scored on all, and no estimate promises more."""
    scorer, memory = Scorer({i: 1.0 + i for i in range(12)}), state()
    assert set(lazy_scores(scorer, memory, list(range(12)), 0.0)) == {0, 1, 2, 3}
    assert scorer.asked == [(list(range(12)), 2), ([0, 1, 2, 3], None)]
    assert memory.increments == {i: 1.0 + i for i in range(12)}


@pytest.mark.parametrize(
    ("count", "windows", "distance"), [(7, 10, "kl"), (12, 1, "kl"), (12, 10, "perplexity")], ids=["few", "one", "text"]
)
def test_new_candidates_are_scored_where_an_estimate_does_not_pay(count, windows, distance):
    scorer = Scorer({i: 2.0 + i for i in range(count)}, windows)
    lazy_scores(scorer, state(distance=distance), list(range(count)), 1.0)
    assert scorer.asked == [(list(range(count)), None)]


def test_the_neighbours_of_the_last_removal_are_scored_again():
    """Three before it and three behind it of those that are left and allowed, beside the four lowest estimates."""
    left = [i for i in range(40) if i not in (20, 21, 18)]
    scorer = Scorer({i: 10.0 if i >= 4 else 1.0 for i in left})
    memory = state({i: float(i >= 4) * 9.0 + 1.0 for i in left}, last=20)
    found = lazy_scores(scorer, memory, [i for i in left if i != 23], 0.0)
    assert set(found) == {0, 1, 2, 3} | {16, 17, 19} | {22, 24}


@pytest.mark.parametrize(("best", "more"), [(0.69, False), (0.71, True)])
def test_an_old_increment_may_have_shrunk_to_seven_tenths(best, more):
    """The next estimate is 1: what is found below 0.7 ends the step."""
    scorer = Scorer(dict.fromkeys(range(20), 5.0 + best))
    memory = state({i: 0.1 if i < 4 else 1.0 for i in range(20)})
    lazy_scores(scorer, memory, list(range(20)), 5.0)
    assert scorer.scored()[:4] == [0, 1, 2, 3]
    assert (len(scorer.scored()) > 4) is more


@pytest.mark.parametrize(("candidates", "further"), [(20, 8), (16, 4), (40, 12)])
def test_no_more_than_a_quarter_is_scored_beside_the_first(candidates, further):
    """In batches of four, even where every estimate promises more than what is found."""
    scorer = Scorer(dict.fromkeys(range(candidates), 100.0))
    lazy_scores(scorer, state(dict.fromkeys(range(candidates), -1.0)), list(range(candidates)), 0.0)
    assert scorer.scored() == list(range(4 + further))
    assert all(len(asked) == 4 for asked, _ in scorer.asked)


def test_increments_are_those_of_the_squares():
    """From 3 to 5 an angle adds 16: that is what the next step begins with."""
    scorer, memory = Scorer(dict.fromkeys(range(4), 5.0)), state(dict.fromkeys(range(4), 0.0), distance="angular")
    lazy_scores(scorer, memory, list(range(4)), 3.0)
    assert memory.increments == dict.fromkeys(range(4), 16.0)
