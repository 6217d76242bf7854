"""Runs the Triton kernels on the CPU through Triton's interpreter, which must be chosen before Triton is imported:
hence a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: the kernels are not interpreted")

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("script", sorted(path.name for path in HERE.glob("interpret_*.py")))
def test_interpreted(script: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / script)],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
