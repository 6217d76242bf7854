"""Means and standard errors against the standard library, and against what chance does."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from depthprune_runtime import InputError
from depthprune_runtime.evaluation.results import (
    PAPER_TASKS,
    Metric,
    TaskResult,
    paired_difference,
    paired_papers_mean,
    papers_mean,
)


def result(task, offset=0, **hits):
    metrics = {name: Metric.mean(values) for name, values in hits.items()}
    return TaskResult(task, "file", len(next(iter(hits.values()))), metrics, hits, offset)


def test_the_papers_mean_takes_acc_norm_where_it_exists():
    results = [
        result("piqa", acc=(0, 0), acc_norm=(1, 1)),  # 1
        result("winogrande", acc=(1, 0)),  # 0.5
        result("hellaswag", acc=(1, 1), acc_norm=(0, 1)),  # 0.5
        result("arc_easy", acc=(1, 1), acc_norm=(0, 0)),  # 0
        result("arc_challenge", acc=(0, 0), acc_norm=(1, 1)),  # 1
        result("lambada_openai", acc=(1, 1)),
    ]
    mean = papers_mean(results)
    assert mean.value == pytest.approx(0.6)
    # two tasks have a stderr of 0.5, three of 0
    assert mean.stderr == pytest.approx(math.sqrt(0.25 + 0.25) / 5)
    assert papers_mean(results[1:]) is None


def test_perplexity_too_large_for_a_float():
    assert Metric.perplexity([-1e4, -1e4]) == Metric(math.inf, None)


def random_rows(draw, n, both):
    """Two models' rows that agree except where `both` says otherwise."""
    ours = tuple(draw.randrange(2) for _ in range(n))
    return ours, tuple(hit if draw.random() < both else 1 - hit for hit in ours)


def test_the_paired_error_is_what_repeated_draws_show():
    draw = random.Random(0)
    found = [paired_difference(*random_rows(draw, 200, 0.9)) for _ in range(400)]
    spread = statistics.stdev(metric.value for metric in found)
    assert statistics.mean(metric.stderr for metric in found) == pytest.approx(spread, rel=0.15)
    # unpaired, either side alone has sqrt(0.25 / 200)
    assert spread < 0.75 * math.sqrt(2 * 0.25 / 200)


def test_paired_means_of_the_papers_tasks():
    ours = [result(task, acc=(1, 1, 0, 0)) for task in PAPER_TASKS]
    theirs = [result(task, acc=(1, 0, 0, 0)) for task in PAPER_TASKS]
    difference = paired_papers_mean(ours, theirs)
    assert difference.value == pytest.approx(0.25)
    assert difference.stderr == pytest.approx(statistics.stdev([0, 1, 0, 0]) / 2 / math.sqrt(5))
    assert paired_papers_mean(ours, ours).stderr == 0
    assert paired_papers_mean(ours[1:], theirs) is None
    assert paired_papers_mean(ours, theirs[1:]) is None


def test_pairs_must_be_of_the_same_rows():
    with pytest.raises(InputError, match="equally many and at least one, got 1 and 2"):
        paired_difference((1,), (1, 0))
    ours = [result(task, acc=(1, 0)) for task in PAPER_TASKS]
    later = [result(task, offset=2, acc=(1, 0)) for task in PAPER_TASKS]
    with pytest.raises(InputError, match="expected the same rows, got offsets 0 and 2"):
        paired_papers_mean(ours, later)
