"""`kernels/` is a plain folder that imports as depthprune_runtime.kernels only.

With the repository root on sys.path, a regular package named `kernels` would be taken by transformers for the
Hugging Face library of that name.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import depthprune_runtime.kernels
from depthprune_runtime.ops._triton import LAUNCHERS

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_is_no_regular_package() -> None:
    assert depthprune_runtime.kernels.__file__ is None
    for folder in depthprune_runtime.kernels.__path__:
        assert not (Path(folder) / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_package_sees_the_folder() -> None:
    """A symlink in a checkout; real files in an installed package."""
    (folder, *_) = depthprune_runtime.kernels.__path__
    assert (Path(folder) / "launch.py").is_file()
    linked = ROOT / "depthprune_runtime" / "kernels"
    if linked.is_symlink():
        assert linked.readlink() == Path("../kernels")
        assert linked.resolve() == ROOT / "kernels"


def test_nobody_imports_the_bare_name() -> None:
    pattern = re.compile(r"^\s*(import kernels\b|from kernels\b)", re.MULTILINE)
    for folder in ("depthprune_runtime", "kernels", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(path.read_text()), path


MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


@pytest.fixture(scope="module")
def imported() -> dict[str, str]:
    """What each module printed, or how it failed, when it was imported first: one process that forks for each."""
    pytest.importorskip("triton", reason="triton is not installed: the kernel modules do not import")
    ops = {m: next((op for op, home in LAUNCHERS.items() if home == m), "rms_norm") for m in MODULES}
    script = ROOT / "tests" / "helpers" / "import_first.py"
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(ops)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_imported_first(imported: dict[str, str], module: str) -> None:
    """No module needs ops to be there before it, and none touches a GPU or prints."""
    assert imported[module] == ""
