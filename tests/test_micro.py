"""The micro-benchmarks run, and their comparison calls nothing a difference that is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402


def test_micro_benchmarks_run() -> None:
    """Each once, in a process of its own: `make test` does not collect them."""
    pytest.importorskip("pytest_benchmark")
    command = "-m pytest -q benchmarks --benchmark-disable -p no:cacheprovider -k".split()
    done = subprocess.run(
        [sys.executable, *command, "not lm_head"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def stored(path: Path, **medians: tuple[float, float, float]) -> Path:
    stats = [
        {"name": name, "stats": {"q1": q1, "median": median, "q3": q3}} for name, (q1, median, q3) in medians.items()
    ]
    path.write_text(json.dumps({"benchmarks": stats}))
    return path


def test_only_beyond_the_spread_is_it_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored(tmp_path / "a.json", a=(0.9, 1, 1.1), b=(0.9, 1, 1.1), c=(0.9, 1, 1.1), gone=(1, 1, 1))
    after = stored(tmp_path / "b.json", a=(1.05, 1.2, 1.3), b=(1.4, 1.5, 1.6), c=(0.5, 0.6, 0.7), new=(1, 1, 1))
    compare.main([str(before), str(after), "--json"])
    out = capsys.readouterr()
    verdicts = {r["name"]: r["verdict"] for r in json.loads(out.out)}
    assert verdicts == {"a": "the same within the spread", "b": "slower", "c": "faster"}
    assert "gone" in out.err and "new" in out.err
    compare.main([str(before), str(after)])  # no clock fails it
    assert "slower" in capsys.readouterr().out
    compare.main([str(before), str(after), "--fail-above", "1.4"])
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(before), str(after), "--fail-above", "1.2"])
    assert stopped.value.code == 1


def test_another_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"x\.json: expected a file of --benchmark-json"):
        compare.load(path)
