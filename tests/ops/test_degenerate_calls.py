"""No argument of an op or of the decode step ends the process: each call is a result or a Python exception."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "helpers" / "degenerate_calls.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here: the calls cannot be kept apart")
def test_no_call_ends_the_process() -> None:
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
