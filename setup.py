"""Builds the C++ extension `depthprune_runtime._C`; all metadata is in pyproject.toml.

`DEPTHPRUNE_NO_EXTENSION=1` leaves the extension out: every op then runs as plain torch. The CUDA kernels are part of it
where torch has CUDA and its nvcc is there; `DEPTHPRUNE_NO_CUDA=1` leaves them out. They are built for the architectures
of `TORCH_CUDA_ARCH_LIST`, without it for sm_80, sm_90 and, compiled when first loaded, what comes after.
`depthprune_runtime/_build_info.py` is written beside the extension: the torch that it was compiled against.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;9.0+PTX"
OLDEST = {"setuptools": (77, 0), "torch": (2, 11)}


def refuse(message: str) -> NoReturn:
    raise SystemExit(f"depthprune_runtime cannot be built: {message}")


def require(name: str, remedy: str) -> None:
    """Ends in one line where package `name` is missing or too old."""
    oldest = OLDEST[name]
    wanted = f"{name} >= {'.'.join(map(str, oldest))}"
    try:
        version = str(__import__(name).__version__)
    except ImportError:
        refuse(f"expected {wanted}, found none; {remedy}")
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < oldest:
        refuse(f"expected {wanted}, found {version}; {remedy}")


require("setuptools", "pip install --upgrade setuptools")

from setuptools import find_namespace_packages, setup  # noqa: E402  an old one is named first


def toolkits(found: str | None) -> Iterator[Path]:
    """Folders that may hold a CUDA toolkit; `found` is the one that torch takes, which may be that of a wrapper."""
    nvcc = shutil.which("nvcc")
    for folder in (found, "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent):
        if folder:
            yield Path(folder)


def has_headers(toolkit: Path) -> bool:
    folders = [toolkit / "include", *toolkit.glob("targets/*/include")]
    return any((folder / "cuda_runtime_api.h").is_file() for folder in folders)


def toolkit_of(version: str, found: str | None) -> Path | None:
    """A CUDA toolkit of torch's major `version` with its headers and an nvcc that runs; says why there is none."""
    reasons = []
    for toolkit in toolkits(found):
        nvcc = toolkit / "bin" / "nvcc"
        if not has_headers(toolkit):
            reasons.append(f"{toolkit} has no include/cuda_runtime_api.h")
            continue
        try:
            said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            reasons.append(f"{nvcc} does not run ({error})")
            continue
        release = re.search(r"release (\d+)\.", said)
        # torch refuses to build with another major version, and would take the CPU kernels down with it.
        if release is not None and release[1] == version.split(".", maxsplit=1)[0]:
            return toolkit
        reasons.append(f"expected nvcc of CUDA {version}, {nvcc} is {said.strip()!r}")
    why = "; ".join(reasons) or f"nvcc of CUDA {version} not found"
    print(f"CUDA kernels left out: {why}; set CUDA_HOME")
    return None


def builds_cuda() -> bool:
    """Whether the CUDA kernels can be built, with which torch is then told to do so."""
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None or os.environ.get("DEPTHPRUNE_NO_CUDA") == "1":
        return False
    toolkit = toolkit_of(torch.version.cuda, cpp_extension.CUDA_HOME)
    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit)
    return toolkit is not None


def builder(cuda: bool) -> Any:
    """torch's builder, which then also writes what it built against."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):  # type: ignore[misc, valid-type]
        def _info(self) -> Path:
            return Path(self.get_ext_fullpath("depthprune_runtime._C")).with_name("_build_info.py")

        def run(self) -> None:
            super().run()
            lines = ['"""Written by setup.py: what the extension beside it was compiled against."""', ""]
            lines += [f'TORCH = "{torch.__version__}"', f"CUDA_KERNELS = {cuda}", ""]
            self._info().write_text("\n".join(lines))

        def get_outputs(self) -> list[str]:
            return [*super().get_outputs(), *([] if self.inplace else [str(self._info())])]

    return Build


def extension() -> dict[str, Any]:
    """The setup() arguments that build the extension; none where it is left out."""
    if os.environ.get("DEPTHPRUNE_NO_EXTENSION") == "1":
        return {}
    require("torch", "install it, then pip install --no-build-isolation; DEPTHPRUNE_NO_EXTENSION=1 builds without it")
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    flags = ["-O3", "-std=c++20", "-Wall", "-g0"]
    if sys.platform.startswith("linux"):
        # Compile with OpenMP, or at::parallel_for runs on one thread; but do not link it: the symbols then
        # come from torch's own libgomp, and the process keeps one thread pool instead of two.
        flags.append("-fopenmp")
    elif sys.platform == "darwin":
        flags.append("-fopenmp-simd")
    else:
        flags = ["/O2", "/std:c++20", "/openmp:experimental"]
    paths = [ROOT / "csrc/module.cpp", *sorted(ROOT.glob("csrc/cpu/*/*.cpp"))]
    arguments: dict[str, Any] = {"extra_compile_args": flags}
    kind = CppExtension
    cuda = builds_cuda()
    if cuda:
        kind = CUDAExtension
        paths += [*sorted(ROOT.glob("csrc/cuda/*.cpp")), *sorted(ROOT.glob("csrc/cuda/*.cu"))]
        arguments = {"extra_compile_args": {"cxx": flags, "nvcc": ["-O3", "-std=c++17"]}}
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    headers = sorted(path for end in ("h", "cuh", "inc") for path in ROOT.glob(f"csrc/**/*.{end}"))
    module = kind(
        "depthprune_runtime._C",
        [str(path.relative_to(ROOT)) for path in paths],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in headers],
        **arguments,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": builder(cuda)}}


setup(
    # The namespace finder follows the symlink depthprune_runtime/kernels, which has no __init__.py.
    packages=find_namespace_packages(
        include=["depthprune_runtime", "depthprune_runtime.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={"": ["*.json", "*.pyi", "py.typed"]},
    **extension(),
)
