"""How zero-shot results are recorded: scores in one column of quality.csv, single rows in quality_rows.csv.

Single rows are kept because two models right and wrong on the same rows differ by less noise than each has: the
error of a difference needs both. A row of quality_rows.csv holds, for one configuration, task and metric, one bit a
row of the task, the first row the highest bit, as hexadecimal digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from depthprune_runtime.evaluation.results import PAPER_TASKS, Metric, TaskResult, papers_mean

TASKS = (*PAPER_TASKS, "lambada_openai")
LIMIT = 500  # rows of a task that tables report; rows after them are there to tune on
MEAN = "papers' mean"
# What names a configuration: rows of the same one are measured once a commit.
KEY = ("variant", "blocks_fewer", "repair", "calibration", "seed", "tasks", "commit")
_DIGITS = 4  # of a score


def label(tasks: Sequence[str], limit: int, offset: int) -> str:
    """Tasks and, where they are not the first LIMIT, their rows: the column `tasks`."""
    rows = "" if not tasks or (limit, offset) == (LIMIT, 0) else f" [{offset}:{offset + limit}]"
    return ",".join(tasks) + rows


REPORTED = label(TASKS, LIMIT, 0)


def scores(results: Sequence[TaskResult]) -> dict[str, dict[str, float]]:
    """Every metric of every task, and the papers' mean with its standard error where its tasks are there."""
    found = {r.task: {name: round(m.value, _DIGITS) for name, m in r.metrics.items()} for r in results}
    mean = papers_mean(results)
    if mean is not None:
        found[MEAN] = _rounded(mean)
    return found


def _rounded(metric: Metric) -> dict[str, float]:
    values = {"value": metric.value, "stderr": metric.stderr}
    return {name: round(value, _DIGITS + 1) for name, value in values.items() if value is not None}


def to_bits(hits: Sequence[int]) -> str:
    digits = math.ceil(len(hits) / 4)
    number = int("".join(map(str, hits)) + "0" * (4 * digits - len(hits)), 2)
    return f"{number:0{digits}x}"


def from_bits(bits: str, n: int) -> tuple[int, ...]:
    return tuple(map(int, f"{int(bits, 16):0{4 * len(bits)}b}"[:n]))


def single_rows(labels: Mapping[str, Any], results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """Rows of quality_rows.csv of one configuration."""
    return [
        {**labels, "task": r.task, "metric": metric, "offset": r.offset, "n": r.n, "hits": to_bits(hits)}
        for r in results
        for metric, hits in r.hits.items()
    ]


def to_json(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """What `from_json` reads: results from the process that measured them."""
    return [{**r.to_json(), "hits": {name: to_bits(hits) for name, hits in r.hits.items()}} for r in results]


def from_json(stored: Iterable[Mapping[str, Any]]) -> list[TaskResult]:
    found = []
    for fields in stored:
        hits = {name: from_bits(bits, fields["n"]) for name, bits in fields["hits"].items()}
        metrics = {name: Metric(**metric) for name, metric in fields["metrics"].items()}
        found.append(TaskResult(**{**fields, "metrics": metrics, "hits": hits}))
    return found


def recorded(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, ...], list[TaskResult]]:
    """Results by the values of KEY, from rows of quality_rows.csv."""
    found: dict[tuple[str, ...], dict[str, TaskResult]] = {}
    for row in rows:
        hits = from_bits(row["hits"], int(row["n"]))
        tasks = found.setdefault(tuple(row[k] for k in KEY), {})
        empty = TaskResult(row["task"], "recorded", int(row["n"]), offset=int(row["offset"]))
        old = tasks.get(row["task"], empty)
        metrics = {**old.metrics, row["metric"]: Metric.mean(hits)}
        kept = {**old.hits, row["metric"]: hits}
        tasks[row["task"]] = TaskResult(old.task, old.source, old.n, metrics, kept, old.offset)
    return {key: list(tasks.values()) for key, tasks in found.items()}
