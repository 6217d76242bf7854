"""What setup.py builds: the CUDA kernels only where torch has CUDA and its nvcc is there; and what it packs."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
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
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").write_text("")
    monkeypatch.setattr(shutil, "which", lambda _: None)  # a toolkit of this machine is out of sight
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: not str(self).startswith("/usr/local/cuda") and is_file(self))
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
    assert {"csrc/module.cpp", "csrc/cpu/pointwise/norm.cpp", "csrc/cpu/rows/avx2.cpp"} <= set(module.sources)
    assert {"csrc/common/check.h", "csrc/cpu/rows/loops.inc", "csrc/cuda/device.cuh"} <= set(module.depends)
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


def test_a_toolkit_without_headers_is_left_for_one_that_has_them(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nvcc is a wrapper in /usr/local/bin, torch takes /usr/local, which has no headers."""
    wrapper = tmp_path / "usr-local" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.symlink_to(toolkit)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(wrapper.parent.parent))
    monkeypatch.setattr(shutil, "which", lambda _: str(wrapper))
    assert set(built(monkeypatch).sources) >= KERNELS
    home = Path(cpp_extension.CUDA_HOME)
    assert (home / "include" / "cuda_runtime_api.h").is_file()


def test_a_toolkit_without_headers_alone_is_named(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "include" / "cuda_runtime_api.h").unlink()
    module = built(monkeypatch)
    assert not any("cuda" in source for source in module.sources)
    assert f"{tmp_path} has no include/cuda_runtime_api.h" in capsys.readouterr().out


# What a build finds first, and a version that it must not.
LACKS = {
    "torch": "sys.modules['torch'] = None",
    "torch 2.4": "sys.modules['torch'] = types.SimpleNamespace(__version__='2.4.1+cpu')",
    "setuptools": "sys.modules['setuptools'] = None",
    "setuptools 65": "sys.modules['setuptools'] = types.SimpleNamespace(__version__='65.5.0')",
}


@pytest.mark.parametrize("lacking", LACKS)
def test_what_a_build_lacks_is_said_in_one_line(lacking: str) -> None:
    name, _, version = lacking.partition(" ")
    code = f"import sys, types, runpy; {LACKS[lacking]}; sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
    environment = {k: v for k, v in os.environ.items() if k != "DEPTHPRUNE_NO_EXTENSION"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    oldest = {"torch": "2.11", "setuptools": "77.0"}[name]
    found = f"found {version}" if version else "found none"
    assert line.startswith(f"depthprune_runtime cannot be built: expected {name} >= {oldest}, {found}")
    assert "install" in line


def test_a_build_without_the_extension_needs_no_torch() -> None:
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
    environment = os.environ | {"DEPTHPRUNE_NO_EXTENSION": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_build_says_what_it_was_built_against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder writes beside the extension, which need not load to be read."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(cpp_extension.BuildExtension, "run", lambda self: None)
    command = found["cmdclass"]["build_ext"](setuptools.Distribution({"ext_modules": found["ext_modules"]}))
    command.build_lib, command.inplace = str(tmp_path), False
    (tmp_path / "depthprune_runtime").mkdir()
    command.run()
    info = runpy.run_path(str(tmp_path / "depthprune_runtime" / "_build_info.py"))
    assert info["TORCH"] == torch.__version__
    assert info["CUDA_KERNELS"] is any("cuda" in source for source in found["ext_modules"][0].sources)


def test_the_source_distribution_is_what_git_tracks(tmp_path: Path) -> None:
    """Made without the extension, as on any machine: sources of what it cannot build are in it."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0 or not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what it tracks is not known")
    tracked = {name for name in listing.stdout.splitlines() if os.path.lexists(ROOT / name)}
    copy = tmp_path / "copy"
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    for stray in ("depthprune_runtime/_C.cpython-311-x86_64-linux-gnu.so", "depthprune_runtime/_build_info.py"):
        (copy / stray).write_text("")
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "--dist-dir", str(tmp_path / "dist")],
        cwd=copy, env=os.environ | {"DEPTHPRUNE_NO_EXTENSION": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        packed = {member.name.partition("/")[2] for member in tar.getmembers() if not member.isdir()}
    made = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    # The symlink depthprune_runtime/kernels comes as the folder that it names.
    link = "depthprune_runtime/kernels"
    expected = (tracked - {link}) | {f"depthprune_runtime/{name}" for name in tracked if name.startswith("kernels/")}
    assert packed - made == expected
