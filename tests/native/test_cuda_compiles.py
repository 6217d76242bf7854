"""csrc/cuda compiles without a GPU: kernels by nvcc, for each architecture, without spills; bindings against torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import BINDINGS, KERNELS, ROOT, gxx, in_one, torch_includes
from torch.utils import cpp_extension

from depthprune_runtime.ops import implementations

ARCHITECTURES = ("80", "90a")
SPILLS = ["-Xptxas", "-v,--warn-on-spills,--warning-as-error"]


@pytest.mark.usefixtures("needs_gpu")
def test_extension_serves_the_gpu() -> None:
    """Skipped without a GPU, so that a run says where the kernels were not tested."""
    for name in ("rms_norm", "add_rms_norm", "head_rms_norm", "rotary", "rotary_kv_write"):
        assert implementations(name)["CUDA"] == "native"


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels(source: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not there: the CUDA kernels are not compiled for GPUs")
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    # What setup.py and torch's build pass too: some of it takes the operators of half types away.
    flags = ["-O3", "-std=c++17", *cpp_extension.COMMON_NVCC_FLAGS]
    command = [nvcc, "-c", *flags, "-Werror=all-warnings", *targets, *SPILLS, f"-I{ROOT / 'csrc'}"]
    command += [str(source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    for name in ARCHITECTURES:
        assert f"for 'sm_{name}'" in done.stderr, "expected the resources of every kernel"
    assert set(frames) == {("0", "0", "0")}, "expected every value in registers"


def toolkit_includes() -> Path | None:
    """A folder with CUDA's own headers: the toolkit's, or those that Triton brings for its launchers."""
    folders = [Path(cpp_extension.CUDA_HOME) / "include"] if cpp_extension.CUDA_HOME else []
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    except ImportError:
        pass
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()), None)


def test_bindings() -> None:
    """Against the headers that a CUDA build sees; the emulated library has one of its own in place of CUDAStream.h."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there: the bindings of the CUDA kernels are not compiled")
    folder = toolkit_includes()
    if folder is None:
        pytest.skip("cuda_runtime_api.h is not there: the bindings of the CUDA kernels are not compiled")
    # A torch without CUDA lacks cuda_cmake_macros.h, which only says how its libraries export names.
    macros = ["-DC10_USING_CUSTOM_GENERATED_MACROS", "-DC10_CUDA_BUILD_SHARED_LIBS"]
    flags = ["-std=c++20", "-fsyntax-only", *macros, *torch_includes(), f"-isystem{folder}"]
    gxx([*flags, "-x", "c++", "-"], in_one(BINDINGS))
