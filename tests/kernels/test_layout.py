"""`kernels/` is a plain folder that imports as depthprune_runtime.kernels only.

With the repository root on sys.path, a regular package named `kernels` would be taken by transformers for the
Hugging Face library of that name.
"""

from __future__ import annotations

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


# In a process that believes it has a CUDA device, where ops binds the launchers when it is imported.
FIRST = """
import sys, torch
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
import depthprune_runtime.kernels.{module}
assert not torch.cuda.is_initialized(), "CUDA was initialised"
found = sorted(n for n in sys.modules if n.startswith("depthprune_runtime.") and ".kernels" not in n)
assert not found, f"a kernels module imports {{found}}"
from depthprune_runtime import ops
assert ops.implementations("{op}")["CUDA"] == "native"
"""


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "kernels").glob("*.py")))
def test_a_module_is_imported_first(module: str) -> None:
    """No module needs ops to be there before it, and none touches a GPU."""
    pytest.importorskip("triton", reason="triton is not installed: the kernel modules do not import")
    code = FIRST.format(module=module, op=next((op for op, home in LAUNCHERS.items() if home == module), "rms_norm"))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
