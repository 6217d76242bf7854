"""What setup.py builds: the CUDA kernels only where torch has CUDA and its nvcc is there."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {"csrc/cuda/norm.cu", "csrc/cuda/norm_binding.cpp", "csrc/cuda/rotary.cu", "csrc/cuda/rotary_binding.cpp"}


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch that has CUDA 13.0, and a toolkit of that version."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.80'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    for name in ("TORCH_CUDA_ARCH_LIST", "DEPTHPRUNE_NO_CUDA", "DEPTHPRUNE_NO_EXTENSION"):
        monkeypatch.setenv(name, "")  # so that what setup.py sets is undone
        monkeypatch.delenv(name)
    return nvcc


def built(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The extension that setup.py hands to setuptools."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    (module,) = found["ext_modules"]
    assert "csrc/cpu/norm.cpp" in module.sources
    assert "csrc/cuda/device.cuh" in module.depends
    return module


def test_with_cuda(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = built(monkeypatch)
    assert set(module.sources) >= KERNELS
    assert module.extra_compile_args["nvcc"] == ["-O3", "-std=c++17"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"


def test_the_architectures_of_the_user_stay(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    assert set(built(monkeypatch).sources) >= KERNELS
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "10.0"


@pytest.mark.parametrize("why", ["asked", "torch without CUDA", "no toolkit", "another version", "broken nvcc"])
def test_without_cuda(
    why: str, toolkit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "CUDA kernels left out"
    if why == "asked":
        monkeypatch.setenv("DEPTHPRUNE_NO_CUDA", "1")
        said = ""
    elif why == "torch without CUDA":
        monkeypatch.setattr(torch.version, "cuda", None)
        said = ""
    elif why == "no toolkit":
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    elif why == "another version":
        monkeypatch.setattr(torch.version, "cuda", "12.8")
    else:
        toolkit.write_text("#!/bin/sh\nexit 1\n")
    module = built(monkeypatch)
    assert not any("cuda" in source for source in module.sources)
    assert isinstance(module.extra_compile_args, list)
    assert capsys.readouterr().out.startswith(said)
