"""Recorded rows: which of them tables, plots and claims may use, and a table's Markdown. No torch.

Of several rows of one configuration the last one counts; rows of a tree with uncommitted changes (a commit that ends
in +) count nowhere.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Row = Mapping[str, str]
NOT_MEASURED = "not measured"
WHERE = "_where"  # file:line, where a row ends


def published(row: Row) -> bool:
    """Whether it was measured on a commit as it stands: rows of a tree with other changes cannot be measured again."""
    return not row["commit"].endswith("+")


def every_row(name: str, folder: Path | None = None) -> list[dict[str, str]]:
    """All that is recorded, each row with its place."""
    path = (folder or RESULTS) / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return [{**row, WHERE: f"{path.name}:{reader.line_num}"} for row in reader]


def read(name: str, folder: Path | None = None) -> list[dict[str, str]]:
    """The rows that tables and claims may use."""
    return [row for row in every_row(name, folder) if published(row)]


def last(rows: Sequence[Row], *key: str) -> dict[tuple[str, ...], Row]:
    """The last row of every configuration, in order of first appearance."""
    return {tuple(row[k] for k in key): row for row in rows}


def newest(name: str, *key: str) -> dict[tuple[str, ...], Row]:
    """The last row of every configuration where it may be used: an older one would be of another version."""
    return {which: row for which, row in last(every_row(name), *key).items() if published(row)}


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return "No rows yet: **not measured**."
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(out + ["| " + " | ".join(line) + " |" for line in lines])
