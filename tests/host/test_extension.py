"""A missing C++ extension is said once and loudly, and a run of the tests without it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depthprune_runtime.host.extension import SWITCH

ROOT = Path(__file__).resolve().parent.parent.parent
ABSENT = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.endswith("._C") else find(name, *rest)
"""
BROKEN = """
import importlib
load = importlib.import_module
def refuse(name, *rest):
    if name.endswith("._C"):
        raise ImportError("undefined symbol: _ZN5torch")
    return load(name, *rest)
importlib.import_module = refuse
"""
OTHER = """
import sys, types
sys.modules["depthprune_runtime._build_info"] = types.SimpleNamespace(TORCH="1.13.1+cu117")
"""
USE = """
import sys
from depthprune_runtime import ops
from depthprune_runtime.weights.panels import panels_pay
from depthprune_runtime.host.extension import extension
assert extension() is None and not panels_pay()
assert ops.implementations("linear")["CPU"] == "reference", "the kernels are in use"
assert "depthprune_runtime._C" not in sys.modules
"""


def said(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != SWITCH}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    return run.stderr


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (ABSENT, ["was not built"]),
        (OTHER, ["is not loaded", "against torch 1.13.1+cu117", f"this is torch {torch.__version__}"]),
        (BROKEN, ["does not load", f"this is torch {torch.__version__}", "undefined symbol: _ZN5torch"]),
        (OTHER + BROKEN, ["is not loaded", "against torch 1.13.1+cu117"]),
    ],
    ids=["absent", "another torch", "broken", "another torch and broken"],
)
def test_a_missing_extension_is_said(how: str, reason: list[str]) -> None:
    """Once in the log, once as a warning; with the reason, what it costs, and what to do."""
    errors = said(how + USE)
    for part in [*reason, "several times slower", "pip install", f"{SWITCH}=1"]:
        assert errors.count(part) == 2, errors
    assert errors.count("ExtensionWarning") == 1


def test_doing_without_is_quiet() -> None:
    assert said(USE, **{SWITCH: "1"}) == ""


@pytest.mark.parametrize("asked", [False, True])
def test_the_tests_fail_without_it_unless_asked(asked: bool, tmp_path: Path) -> None:
    code = f"{ABSENT}\nimport pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))"
    clean = {k: v for k, v in os.environ.items() if k != SWITCH} | ({SWITCH: "1"} if asked else {})
    arguments = ["-q", "-p", "no:cacheprovider", "tests/ops/test_divergence.py", "tests/host/test_heap.py"]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )
    output = run.stdout + run.stderr
    if asked:
        assert run.returncode == 0, output
        assert "there is no extension to test" in output
    else:
        assert run.returncode == pytest.ExitCode.USAGE_ERROR, output
        assert "the C++ extension is not there" in output
