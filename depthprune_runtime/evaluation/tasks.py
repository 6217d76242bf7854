"""Zero-shot tasks from JSONL files, scored by log-likelihood.

One JSON object a line, plain or gzipped, of one of two kinds:

    {"context": ..., "choices": [...], "gold": i}        multiple choice
    {"contexts": [...], "continuation": ..., "gold": i}  WinoGrande's partial evaluation

Scored is always `" " + choice` after its context, as lm-evaluation-harness does with its default delimiter.

    acc      = mean of [ argmax_i log p(" " + choice_i | context) = gold ]
    acc_norm = the same with each log p divided by the characters of choice_i; multiple choice only
    stderr   = sample standard deviation / sqrt(n)

Names that are no such file are left to lm-eval, if it is installed.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthprune_runtime.engine.runtime import Runtime
from depthprune_runtime.errors import InputError
from depthprune_runtime.evaluation.scoring import continuation_logprobs, encode_pair
from depthprune_runtime.progress import Progress
from depthprune_runtime.texts import DATA_VARIABLE

if TYPE_CHECKING:
    from depthprune_runtime.evaluation.lm_eval_adapter import LmEvalTasks

_SUFFIXES = (".jsonl", ".jsonl.gz")
_DELIMITER = " "


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


@dataclass(frozen=True)
class TaskResult:
    """source: the file, or `lm-eval`; n: rows that were scored, None for a group of lm-eval tasks."""

    task: str
    source: str
    n: int | None
    metrics: dict[str, Metric] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Example:
    """One row: what is scored against what. norms: characters of each choice, None where there is no acc_norm."""

    pairs: tuple[tuple[str, str], ...]  # (context, delimiter + continuation)
    norms: tuple[int, ...] | None
    gold: int


@dataclass(frozen=True)
class JsonlTask:
    name: str
    path: Path
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class TaskSet:
    """What `load_tasks` found: our files, and what is left to lm-eval."""

    files: tuple[JsonlTask, ...]
    harness: LmEvalTasks | None


def find_task(name: str) -> Path | None:
    """The file of a task given by path, or by a name found in the folder $DEPTHPRUNE_DATA."""
    if name.endswith(_SUFFIXES):
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"task {name}: no such file")
        return path
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not name or Path(name).name != name:
        return None
    candidates = (Path(folder).expanduser() / (name + suffix) for suffix in _SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def load_task(path: Path, limit: int | None = None) -> JsonlTask:
    """The first `limit` (default all) rows of a file."""
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1, got {limit}")
    examples = tuple(_example(line, f"{path}:{number}") for number, line in islice(_lines(path), limit))
    if not examples:
        raise InputError(f"{path}: expected at least one row, got an empty file")
    if len({example.norms is None for example in examples}) > 1:
        raise InputError(f"{path}: expected rows of one kind, got some with choices and some with contexts")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return JsonlTask(name, path, examples)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line)."""
    number = 1
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8: byte 0x{error.object[error.start]:02x}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _example(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "choices" in row:
        context = _text(row, "context", where, empty=True)
        choices = _texts(row, "choices", where)
        pairs = tuple((context, _DELIMITER + choice) for choice in choices)
        return Example(pairs, tuple(map(len, choices)), _gold(row, len(pairs), where))
    if "contexts" in row:
        continuation = _DELIMITER + _text(row, "continuation", where)
        pairs = tuple((context, continuation) for context in _texts(row, "contexts", where))
        return Example(pairs, None, _gold(row, len(pairs), where))
    raise InputError(f"{where}: expected a row with choices or contexts, got {sorted(row)}")


def _text(row: Mapping[str, Any], key: str, where: str, empty: bool = False) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not (text or empty):
        raise InputError(f"{where}: {key}: expected {'a' if empty else 'a non-empty'} string, got {text!r}")
    return text


def _texts(row: Mapping[str, Any], key: str, where: str) -> list[str]:
    texts = row[key]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t for t in texts):
        raise InputError(f"{where}: {key}: expected a list of at least two non-empty strings, got {texts!r}")
    return texts


def _gold(row: Mapping[str, Any], choices: int, where: str) -> int:
    gold = row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < choices:
        raise InputError(f"{where}: gold: expected an index from 0 to {choices - 1}, got {gold!r}")
    return gold


def _best(scores: Sequence[float]) -> int:
    """Index of the largest; the first of equals, as numpy's argmax."""
    return max(range(len(scores)), key=scores.__getitem__)


def evaluate_task(
    runtime: Runtime, task: JsonlTask, batch_tokens: int = 4096, progress: Progress | None = None
) -> TaskResult:
    """acc and, for multiple choice, acc_norm of `runtime` on `task`."""
    pairs = [encode_pair(runtime, *pair) for example in task.examples for pair in example.pairs]
    with (progress or Progress()).stage(task.name, len(pairs)) as advance:
        scores = iter(continuation_logprobs(runtime, pairs, batch_tokens, advance))
    hits: list[float] = []
    normed_hits: list[float] = []
    for example in task.examples:
        logprobs = [score.logprob for score in islice(scores, len(example.pairs))]
        hits.append(float(_best(logprobs) == example.gold))
        if example.norms is not None:
            normed = [logprob / norm for logprob, norm in zip(logprobs, example.norms, strict=True)]
            normed_hits.append(float(_best(normed) == example.gold))
    metrics = {"acc": Metric.mean(hits)}
    if normed_hits:
        metrics["acc_norm"] = Metric.mean(normed_hits)
    return TaskResult(task.name, str(task.path), len(hits), metrics)


def load_tasks(names: Sequence[str], limit: int | None = None) -> TaskSet:
    """JSONL tasks (paths, or names in $DEPTHPRUNE_DATA), and lm-eval's (all other names).

    limit: only the first rows of each. Raises InputError for unknown names and bad rows, before any work.
    """
    if not names:
        raise InputError("tasks: expected at least one, got none")
    found = [(name, find_task(name)) for name in names]
    others = [name for name, path in found if path is None]
    files = tuple(load_task(path, limit) for _, path in found if path is not None)
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
