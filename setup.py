"""Builds the C++ extension `depthprune_runtime._C`; all metadata is in pyproject.toml.

`DEPTHPRUNE_NO_EXTENSION=1` leaves the extension out: every op then runs as plain torch. The CUDA kernels are part of it
where torch has CUDA and its nvcc is there; `DEPTHPRUNE_NO_CUDA=1` leaves them out. They are built for the architectures
of `TORCH_CUDA_ARCH_LIST`, without it for sm_80, sm_90 and, compiled when first loaded, what comes after.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;9.0+PTX"


def builds_cuda() -> bool:
    """Whether the CUDA kernels can be built; says why if torch could run them."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None or os.environ.get("DEPTHPRUNE_NO_CUDA") == "1":
        return False
    if CUDA_HOME is None:
        print(f"CUDA kernels left out: nvcc of CUDA {torch.version.cuda} not found; set CUDA_HOME")
        return False
    nvcc = Path(CUDA_HOME) / "bin" / "nvcc"
    try:
        version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"CUDA kernels left out: {nvcc} does not run ({error}); set CUDA_HOME")
        return False
    found = re.search(r"release (\d+)\.", version)
    # torch refuses to build with another major version, and would take the CPU kernels down with it.
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        print(f"CUDA kernels left out: expected nvcc of CUDA {torch.version.cuda}, got {version.strip()!r}")
        return False
    return True


def extension() -> dict[str, Any]:
    """The setup() arguments that build the extension; none where it is left out."""
    if os.environ.get("DEPTHPRUNE_NO_EXTENSION") == "1":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    flags = ["-O3", "-std=c++20", "-Wall", "-g0"]
    if sys.platform.startswith("linux"):
        # Compile with OpenMP, or at::parallel_for runs on one thread; but do not link it: the symbols then
        # come from torch's own libgomp, and the process keeps one thread pool instead of two.
        flags.append("-fopenmp")
    elif sys.platform == "darwin":
        flags.append("-fopenmp-simd")
    else:
        flags = ["/O2", "/std:c++20", "/openmp:experimental"]
    paths = [ROOT / "csrc/module.cpp", *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    arguments: dict[str, Any] = {"extra_compile_args": flags}
    kind = CppExtension
    if builds_cuda():
        kind = CUDAExtension
        paths += [*sorted(ROOT.glob("csrc/cuda/*.cpp")), *sorted(ROOT.glob("csrc/cuda/*.cu"))]
        arguments = {"extra_compile_args": {"cxx": flags, "nvcc": ["-O3", "-std=c++17"]}}
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    headers = sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")])
    module = kind(
        "depthprune_runtime._C",
        [str(path.relative_to(ROOT)) for path in paths],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in headers],
        **arguments,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(
    # The namespace finder follows the symlink depthprune_runtime/kernels, which has no __init__.py.
    packages=find_namespace_packages(
        include=["depthprune_runtime", "depthprune_runtime.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={"": ["*.json", "py.typed"]},
    **extension(),
)
