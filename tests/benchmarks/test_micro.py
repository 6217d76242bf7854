"""The micro-benchmarks run, and their comparison calls nothing a difference that is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import compare
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_micro_benchmarks_run() -> None:
    """Each once, in a process of its own: `make test` does not collect them."""
    pytest.importorskip("pytest_benchmark")
    command = ["-m", "pytest", "-q", "benchmarks", "--benchmark-disable", "-p", "no:cacheprovider", "-k"]
    done = subprocess.run(
        [sys.executable, *command, "take0 and not lm_head"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


Medians = dict[str, list[tuple[float, float, float]]]


def stored(path: Path, found: Medians) -> Path:
    """A file of --benchmark-json: (q1, median, q3) of every take."""
    rows = [
        {"name": f"{name}[{shape}take{i}]", "stats": dict(zip(("q1", "median", "q3"), take, strict=True))}
        for shape, (name, takes) in zip(("", "x-", "x-cpu-", "", ""), found.items(), strict=False)
        for i, take in enumerate(takes)
    ]
    path.write_text(json.dumps({"benchmarks": rows}))
    return path


STILL = [(0.9, 1, 1.1), (0.95, 1.05, 1.1)]


def verdicts(before: Path, after: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    compare.main([str(before), str(after), "--json"])
    return {r["name"].partition("[")[0]: r["verdict"] for r in json.loads(capsys.readouterr().out)}


def test_only_beyond_the_spread_is_it_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored(tmp_path / "a.json", dict.fromkeys("abcd", STILL))
    changed: Medians = {"a": [(1.2, 1.3, 1.4), (1.0, 1.1, 1.2)], "b": [(1.4, 1.5, 1.6)] * 2, "c": [(0.5, 0.6, 0.7)]}
    after = stored(tmp_path / "b.json", {**changed, "new": STILL})
    assert verdicts(before, after, capsys) == {"a": "the same within the spread", "b": "slower", "c": "faster"}
    compare.main([str(before), str(after)])  # no clock fails it
    out = capsys.readouterr()
    assert "only in" in out.err and "d" in out.err and "new" in out.err
    compare.main([str(before), str(after), "--fail-above", "1.4"])
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(before), str(after), "--fail-above", "1.2"])
    assert stopped.value.code == 1


def test_what_the_machine_alone_changes_is_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored(tmp_path / "a.json", {"test_control": STILL, "b": STILL})
    after = stored(tmp_path / "b.json", {"test_control": [(1.4, 1.7, 2.0)], "b": [(1.6, 1.7, 1.8)]})
    assert verdicts(before, after, capsys)["b"] == "the same within the spread"
    again = stored(tmp_path / "c.json", {"test_control": STILL, "b": [(1.6, 1.7, 1.8)]})
    assert verdicts(before, again, capsys)["b"] == "slower"


def test_another_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"x\.json: expected a file of --benchmark-json"):
        compare.load(path)
