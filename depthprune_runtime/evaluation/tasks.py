"""Zero-shot tasks, scored by log-likelihood.

    acc        = mean of [ argmax_i log p(" " + choice_i | context) = gold ]; for a continuation without choices
                 (LAMBADA), of [ each of its tokens is the greedy choice ]
    acc_norm   = the same with each log p divided by the characters of choice_i; multiple choice only
    perplexity = exp of minus the mean log p(" " + continuation | context); continuations without choices only

Rows come from JSONL files (`task_files`). Names that are no such file are left to lm-eval, if it is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from depthprune_runtime.engine.runtime import Runtime
from depthprune_runtime.errors import InputError
from depthprune_runtime.evaluation.results import Metric, TaskResult
from depthprune_runtime.evaluation.scoring import ContinuationScore, continuation_logprobs, encode_pair
from depthprune_runtime.evaluation.task_files import Example, JsonlTask, find_task, load_task
from depthprune_runtime.progress import Progress
from depthprune_runtime.texts import DATA_VARIABLE

if TYPE_CHECKING:
    from depthprune_runtime.evaluation.lm_eval_adapter import LmEvalTasks


@dataclass(frozen=True)
class TaskSet:
    """What `load_tasks` found: our files, and what is left to lm-eval."""

    files: tuple[JsonlTask, ...]
    harness: LmEvalTasks | None


def _best(scores: Sequence[float]) -> int:
    """Index of the largest; the first of equals, as numpy's argmax."""
    return max(range(len(scores)), key=scores.__getitem__)


def _row_hits(example: Example, scores: Sequence[ContinuationScore]) -> dict[str, int]:
    """1 or 0 by accuracy metric."""
    logprobs = [score.logprob for score in scores]
    if example.kind == "continuation":
        return {"acc": int(scores[0].is_greedy)}
    found = {"acc": int(_best(logprobs) == example.gold)}
    if example.norms is not None:
        normed = [logprob / norm for logprob, norm in zip(logprobs, example.norms, strict=True)]
        found["acc_norm"] = int(_best(normed) == example.gold)
    return found


def evaluate_task(
    runtime: Runtime, task: JsonlTask, batch_tokens: int = 4096, progress: Progress | None = None
) -> TaskResult:
    """All metrics of `runtime` on `task`, and which rows it got right."""
    pairs = [encode_pair(runtime, *pair) for example in task.examples for pair in example.pairs]
    with (progress or Progress()).stage(task.name, len(pairs)) as advance:
        scores = continuation_logprobs(runtime, pairs, batch_tokens, advance)
    remaining = iter(scores)
    rows = [_row_hits(example, list(islice(remaining, len(example.pairs)))) for example in task.examples]
    hits = {name: tuple(row[name] for row in rows) for name in rows[0]}
    metrics = {name: Metric.mean(values) for name, values in hits.items()}
    if task.kind == "continuation":
        metrics["perplexity"] = Metric.perplexity([score.logprob for score in scores])
    return TaskResult(task.name, str(task.path), len(rows), metrics, hits, task.offset)


def load_tasks(names: Sequence[str], limit: int | None = None, offset: int = 0) -> TaskSet:
    """JSONL tasks (paths, or names in $DEPTHPRUNE_DATA), and lm-eval's (all other names).

    Args:
        limit: how many rows of each at most; None takes all.
        offset: how many rows of each file to leave out before them; lm-eval's tasks have none.

    Raises:
        InputError: unknown names and bad rows, before any work.
    """
    if not names:
        raise InputError("tasks: expected at least one, got none")
    found = [(name, find_task(name)) for name in names]
    others = [name for name, path in found if path is None]
    if others and offset:
        raise InputError(f"offset: expected tasks that are .jsonl[.gz] files, got {others}; leave offset out for them")
    files = tuple(load_task(path, limit, offset) for _, path in found if path is not None)
    return TaskSet(files, _harness(others, limit) if others else None)


def evaluate(
    runtime: Runtime, tasks: TaskSet, batch_tokens: int = 4096, progress: Progress | None = None
) -> list[TaskResult]:
    """Results of the files in the order given, then of lm-eval's tasks; batch_tokens: tokens in one forward pass."""
    # lm-eval runs first: its data may come from a network, and a failure should not cost the work on files
    theirs = [] if tasks.harness is None else tasks.harness.evaluate(runtime, batch_tokens, progress)
    return [evaluate_task(runtime, task, batch_tokens, progress) for task in tasks.files] + theirs


def _harness(names: Sequence[str], limit: int | None) -> LmEvalTasks:
    try:
        from depthprune_runtime.evaluation.lm_eval_adapter import LmEvalTasks
    except InputError as error:
        raise InputError(
            f"task {names[0]}: no .jsonl[.gz] file, and not in the folder ${DATA_VARIABLE}; as for other tasks, {error}"
        ) from error
    return LmEvalTasks(names, limit)


def render(results: Sequence[TaskResult]) -> str:
    """A table; metrics other than acc and acc_norm follow by name."""
    table: list[tuple[str, ...]] = [("task", "n", "acc", "stderr", "acc_norm", "stderr", "other")]
    for result in results:
        cells = [result.task, "" if result.n is None else str(result.n)]
        for name in ("acc", "acc_norm"):
            metric = result.metrics.get(name)
            cells += ["", ""] if metric is None else [f"{metric.value:.4f}", _number(metric.stderr)]
        others = [
            f"{name} {m.value:.4f} +- {_number(m.stderr)}"
            for name, m in result.metrics.items()
            if name not in ("acc", "acc_norm")
        ]
        table.append((*cells, ", ".join(others)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
