"""Shared by all benchmarks: interleaved timing and rows that say where they come from."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
UNCOMMITTED = "uncommitted"  # ignored by git
_PACKAGES = ("torch", "transformers", "triton")


def _cpu_name() -> str:
    """Model name and the instruction sets that decide speed."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in lines.items()}
    flags = set(fields.get("flags", "").split())
    shown = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{fields.get('model name', 'unknown')} ({' '.join(shown)})"


def _commit() -> str:
    """Short hash, with + where the working tree differs from it; results/ itself does not count."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def environment() -> dict[str, str]:
    """Machine, versions, commit and command: the columns every row ends with."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": gpu or _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "versions": " ".join(f"{k} {v}" for k, v in versions.items()),
        "commit": _commit(),
        "command": shlex.join(["python", *map(_from_root, sys.argv)]),
    }


def _from_root(argument: str) -> str:
    return os.path.relpath(argument, ROOT) if argument and Path(argument).exists() else argument


def interleaved(candidates: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round in turn, so that a drifting machine treats all alike."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the quartiles around it."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def is_clean(commit: str) -> bool:
    """Whether the tree was that commit's, so that a row can be measured again."""
    return not commit.endswith("+")


def recorded_rows(name: str) -> list[dict[str, str]]:
    """Published rows of `<name>.csv`; none where it is not there."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(name: str, rows: Sequence[Mapping[str, Any]], folder: Path | None = None) -> Path:
    """Append `rows` to `<name>.csv`; the columns of a file never change silently.

    Without a folder they go to benchmarks/results, which is published. Rows of a tree that differs from its commit
    go to the folder `uncommitted` in it instead, which git ignores: nobody could measure them again.
    """
    folder = folder or RESULTS
    if folder == RESULTS and not all(is_clean(str(row["commit"])) for row in rows):
        folder = folder / UNCOMMITTED
        folder.mkdir(exist_ok=True)
        print(f"the tree has changes without a commit: rows go to {folder / name}.csv", file=sys.stderr)
    path = folder / f"{name}.csv"
    columns = list(rows[0])
    if path.exists():
        with path.open(newline="") as file:
            stored = next(csv.reader(file))
        if stored != columns:
            raise SystemExit(f"{path}: its columns {stored} are not {columns}; start a new file")
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def print_json(data: object) -> None:
    print(json.dumps(data, indent=2))
