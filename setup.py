"""Builds the C++ extension `depthprune_runtime._C`; all metadata is in pyproject.toml.

`DEPTHPRUNE_NO_EXTENSION=1` leaves the extension out: every op then runs as plain torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent


def extension() -> dict[str, Any]:
    """The setup() arguments that build the extension; none where it is left out."""
    if os.environ.get("DEPTHPRUNE_NO_EXTENSION") == "1":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-O3", "-std=c++20", "-Wall", "-g0"]
    if sys.platform.startswith("linux"):
        # Compile with OpenMP, or at::parallel_for runs on one thread; but do not link it: the symbols then
        # come from torch's own libgomp, and the process keeps one thread pool instead of two.
        flags.append("-fopenmp")
    elif sys.platform == "darwin":
        flags.append("-fopenmp-simd")
    else:
        flags = ["/O2", "/std:c++20", "/openmp:experimental"]
    sources = [Path("csrc/module.cpp"), *sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/cpu/*.cpp"))]
    headers = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/**/*.h"))
    module = CppExtension(
        "depthprune_runtime._C",
        [str(path) for path in sources],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path) for path in headers],
        extra_compile_args=flags,
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
