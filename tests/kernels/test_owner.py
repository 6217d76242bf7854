"""One owner per op and device: Triton serves on CUDA what C++ does not. In a process that believes it has a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: there is one candidate only")

from depthprune_runtime.ops._triton import LAUNCHERS

# The C++ extension is replaced by a module that registers `names` for CUDA when it is imported.
CODE = """
import importlib.abc, importlib.machinery, logging, sys, torch

class Extension(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name == "depthprune_runtime._C":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        module.library = torch.library.Library("depthprune", "IMPL")
        for name in {names!r}:
            module.library.impl(name, lambda *arguments: None, "CUDA")

sys.meta_path.insert(0, Extension())
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
from depthprune_runtime import ops
assert ops.implementations("rms_norm")["CUDA"] == ops.implementations("add_rms_norm")["CUDA"] == "native"
assert not torch.cuda.is_initialized()
"""


def named(names: list[str]) -> str:
    return ", ".join(names)


EVERY = list(LAUNCHERS)
NORMS = ["add_rms_norm", "rms_norm"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], [f"CUDA: Triton serves {named(EVERY)}"]),
        (
            ["rms_norm"],
            ["CUDA: C++ serves rms_norm", f"CUDA: Triton serves {named([n for n in EVERY if n != 'rms_norm'])}"],
        ),
        (
            NORMS,
            [
                f"CUDA: C++ serves {named(NORMS)}",
                f"CUDA: Triton serves {named([n for n in EVERY if n not in NORMS])}",
            ],
        ),
    ],
)
def test_triton_leaves_to_cpp_what_is_its_own(names: list[str], said: list[str]) -> None:
    code = CODE.replace("{names!r}", repr(names))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == said
    assert "overrid" not in run.stderr.lower()
