"""Rows of zero-shot tasks, one JSON object a line, plain or gzipped, of one of three kinds.

    {"context": ..., "choices": [...], "gold": i}        multiple choice
    {"contexts": [...], "continuation": ..., "gold": i}  WinoGrande's partial evaluation
    {"context": ..., "continuation": ...}                the next words, as LAMBADA

Scored is always `" " + choice` after its context, as lm-evaluation-harness does with its default delimiter.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.paths import source_path
from depthprune_runtime.texts import DATA_VARIABLE

_SUFFIXES = (".jsonl", ".jsonl.gz")
_DELIMITER = " "
Kind = Literal["choices", "contexts", "continuation"]


@dataclass(frozen=True)
class Example:
    """One row: what is scored against what.

    Args:
        kind: which kind of row it is, by the name of its list, or `continuation`.
        pairs: (context, delimiter + continuation).
        norms: characters of each choice; None where there is no acc_norm.
        gold: the right pair; of a `continuation` there is one pair, right if each of its tokens is the greedy choice.
    """

    kind: Kind
    pairs: tuple[tuple[str, str], ...]
    norms: tuple[int, ...] | None = None
    gold: int = 0


@dataclass(frozen=True)
class JsonlTask:
    """offset: rows of the file before the first example."""

    name: str
    path: Path
    examples: tuple[Example, ...]
    offset: int = 0

    @property
    def kind(self) -> Kind:
        return self.examples[0].kind


def find_task(name: str) -> Path | None:
    """The file of a task given by path, or by a name found in the folder $DEPTHPRUNE_DATA."""
    if name.endswith(_SUFFIXES):
        path = source_path(name, "task")
        if not path.is_file():
            raise InputError(f"task {name}: no such file")
        return path
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not name or Path(name).name != name:
        return None
    candidates = [source_path(Path(folder) / (name + suffix), "task") for suffix in _SUFFIXES]
    return next((path for path in candidates if path.is_file()), None)


def load_task(path: Path, limit: int | None = None, offset: int = 0) -> JsonlTask:
    """Rows `offset` to `offset + limit` of a file.

    Args:
        limit: how many rows at most; None takes all.
        offset: how many rows to leave out before the first; they are not read as rows.

    Raises:
        InputError: rows that are none or of different kinds, or a file with no row after `offset`.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1, got {limit}")
    if offset < 0:
        raise InputError(f"offset: expected at least 0, got {offset}")
    stop = None if limit is None else offset + limit
    examples = tuple(_example(line, f"{path}:{number}") for number, line in islice(_lines(path), offset, stop))
    if not examples:
        after = f" after the first {offset}" if offset else ""
        raise InputError(f"{path}: expected at least one row{after}, got none")
    kinds = sorted({example.kind for example in examples})
    if len(kinds) > 1:
        raise InputError(f"{path}: expected rows of one kind, got {' and '.join(kinds)}")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return JsonlTask(name, path, examples, offset)


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
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of levels
        raise InputError(f"{where}: not JSON that can be read: {printable(error)}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "choices" in row:
        context = _text(row, "context", where, empty=True)
        choices = _texts(row, "choices", where)
        pairs = tuple((context, _DELIMITER + choice) for choice in choices)
        return Example("choices", pairs, tuple(map(len, choices)), _gold(row, len(pairs), where))
    if "contexts" in row:
        continuation = _DELIMITER + _text(row, "continuation", where)
        pairs = tuple((context, continuation) for context in _texts(row, "contexts", where))
        return Example("contexts", pairs, gold=_gold(row, len(pairs), where))
    if "continuation" in row:
        context = _text(row, "context", where, empty=True)
        return Example("continuation", ((context, _DELIMITER + _text(row, "continuation", where)),))
    raise InputError(f"{where}: expected a row with choices, contexts or a continuation, got {printable(sorted(row))}")


def _text(row: Mapping[str, Any], key: str, where: str, empty: bool = False) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not (text or empty):
        raise InputError(
            f"{where}: {key}: expected {'a' if empty else 'a non-empty'} string, got {printable(repr(text))}"
        )
    return text


def _texts(row: Mapping[str, Any], key: str, where: str) -> list[str]:
    texts = row[key]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t for t in texts):
        raise InputError(
            f"{where}: {key}: expected a list of at least two non-empty strings, got {printable(repr(texts))}"
        )
    return texts


def _gold(row: Mapping[str, Any], choices: int, where: str) -> int:
    gold = row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < choices:
        raise InputError(f"{where}: gold: expected an index from 0 to {choices - 1}, got {printable(repr(gold))}")
    return gold
