"""What zero-shot tasks give: metrics with standard errors, and what they say together.

    stderr of a mean                      = sample standard deviation / sqrt(n)
    stderr of a paired difference         = the same of the differences row by row
    stderr of the mean of k tasks         = sqrt(sum of their squares) / k
    stderr of perplexity exp(-m), m mean  = exp(-m) * stderr of m  (delta method)

Two models that are scored on the same rows are right and wrong together: the paired error of their difference
is smaller than what their own errors suggest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from depthprune_runtime.errors import InputError

PAPER_TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
_LARGEST_EXPONENT = 700.0  # of what float64 can hold


@dataclass(frozen=True)
class Metric:
    """stderr: None where it is not defined, as for a single row."""

    value: float
    stderr: float | None

    @classmethod
    def mean(cls, values: Sequence[float]) -> Metric:
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return cls(mean, None)
        return cls(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n))

    @classmethod
    def perplexity(cls, logprobs: Sequence[float]) -> Metric:
        """exp of minus the mean log-probability; infinite where float64 cannot hold it."""
        mean = cls.mean(logprobs)
        value = math.exp(-mean.value) if -mean.value < _LARGEST_EXPONENT else math.inf
        return cls(value, None if mean.stderr is None or math.isinf(value) else value * mean.stderr)

    @classmethod
    def mean_of_tasks(cls, metrics: Sequence[Metric]) -> Metric:
        """Unweighted mean of metrics over different rows."""
        errors = [metric.stderr for metric in metrics]
        known = [error for error in errors if error is not None]
        stderr = math.hypot(*known) / len(metrics) if len(known) == len(metrics) else None
        return cls(math.fsum(metric.value for metric in metrics) / len(metrics), stderr)


@dataclass(frozen=True)
class TaskResult:
    """Result of one task.

    Args:
        source: the file, or `lm-eval`.
        n: rows that were scored; None for a group of lm-eval tasks.
        metrics: value and standard error by name.
        hits: 0 or 1 for every row in order, by accuracy metric; empty where rows are not known (lm-eval).
        offset: rows of the file before the first scored one.
    """

    task: str
    source: str
    n: int | None
    metrics: dict[str, Metric] = field(default_factory=dict)
    hits: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    offset: int = 0

    def to_json(self) -> dict[str, Any]:
        """All but the single rows."""
        found = asdict(self)
        del found["hits"]
        return found

    @property
    def paper_metric(self) -> str:
        """The accuracy that the pruning papers report: acc_norm where it exists, else acc."""
        return "acc_norm" if "acc_norm" in self.metrics else "acc"


def _by_paper(
    results: Sequence[TaskResult], tasks: Sequence[str], value: Callable[[TaskResult], Metric]
) -> Metric | None:
    """Mean of one value a task, None where a task is missing."""
    by_name = {result.task: result for result in results}
    if any(task not in by_name for task in tasks):
        return None
    return Metric.mean_of_tasks([value(by_name[task]) for task in tasks])


def papers_mean(results: Sequence[TaskResult], tasks: Sequence[str] = PAPER_TASKS) -> Metric | None:
    """Mean accuracy as pruning papers report it: acc_norm where it exists, else acc.

    Args:
        tasks: PIQA, WinoGrande, HellaSwag, ARC-e and ARC-c unless others are given.

    Returns:
        The mean with its standard error; None where one of the tasks is missing.
    """
    return _by_paper(results, tasks, lambda result: result.metrics[result.paper_metric])


def paired_difference(ours: Sequence[int], theirs: Sequence[int]) -> Metric:
    """Mean of `ours - theirs`, row by row, with its standard error.

    Raises:
        InputError: the two do not score the same number of rows.
    """
    if len(ours) != len(theirs) or not ours:
        raise InputError(f"paired rows: expected equally many and at least one, got {len(ours)} and {len(theirs)}")
    return Metric.mean([a - b for a, b in zip(ours, theirs, strict=True)])


def paired_papers_mean(
    ours: Sequence[TaskResult], theirs: Sequence[TaskResult], tasks: Sequence[str] = PAPER_TASKS
) -> Metric | None:
    """Difference of two models' `papers_mean` on the same rows, with its paired standard error.

    Returns:
        Ours minus theirs; None where one of the tasks is missing on either side.

    Raises:
        InputError: a task was scored on other rows.
    """
    others = {result.task: result for result in theirs}
    if any(task not in others for task in tasks):
        return None

    def difference(result: TaskResult) -> Metric:
        other, name = others[result.task], result.paper_metric
        if result.offset != other.offset:
            raise InputError(f"{result.task}: expected the same rows, got offsets {result.offset} and {other.offset}")
        return paired_difference(result.hits.get(name, ()), other.hits.get(name, ()))

    return _by_paper(ours, tasks, difference)
