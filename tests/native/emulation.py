"""Builds csrc/cuda for the CPU: the kernels over cuda_emulation.h and the bindings that see tensors, as one library.

Loading it registers the bindings under the CUDA key; `call` runs them on CPU tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "native"
BUILD = ROOT / "build" / "cuda-emulation"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc" / "cuda").glob("*_binding.cpp"))
# Products and sums stay apart where the source says so, and a misaligned vector stops the process.
KERNEL_FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
KERNEL_FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
ORDER = '#include "cuda_emulation.h"\nextern "C" void set_order(int order) { emulation_order = order; }\n'


def gxx(arguments: list[str], source: str | None = None) -> None:
    command = ["g++", "-Wall", "-Werror", "-fPIC", *arguments]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def torch_includes() -> list[str]:
    return [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]


def in_one(sources: list[Path]) -> str:
    """The sources as one translation unit: most of the time of each goes into torch's headers."""
    return "".join(f'#include "{source}"\n' for source in sources)


def digest() -> str:
    """Of all that the library is made of; what has not changed is not built again."""
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h") or p in BINDINGS]
    files += [*HERE.rglob("*.h"), Path(__file__)]
    found = hashlib.sha256(torch.__version__.encode())
    for path in sorted(files):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def compile_and_link(folder: Path, library: Path) -> None:
    emulated = [f"-I{HERE / 'emulated'}", f"-I{HERE}"]
    objects = [folder / f"{name}.o" for name in (*(path.stem for path in KERNELS), "bindings", "order")]
    kernel_flags = [*KERNEL_FLAGS, *emulated, f"-I{ROOT / 'csrc'}"]
    for source, target in zip(KERNELS, objects, strict=False):
        gxx([*kernel_flags, "-x", "c++", "-c", str(source), "-o", str(target)])
    flags = ["-std=c++20", "-O0", *emulated, *torch_includes()]
    gxx([*flags, "-x", "c++", "-c", "-", "-o", str(objects[-2])], in_one(BINDINGS))
    gxx([*kernel_flags, "-x", "c++", "-c", "-", "-o", str(objects[-1])], ORDER)
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    unfinished = folder / "emulated.so"
    gxx(["-shared", *map(str, objects), "-o", str(unfinished), *paths, "-ltorch_cpu", "-lc10"])
    unfinished.replace(library)


def load() -> ctypes.CDLL:
    """The library, built once; its `set_order` chooses in which order the threads of a block run."""
    import fcntl  # not on Windows, where the tests are skipped

    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"{digest()}.so"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test workers: one builds, the others wait
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                compile_and_link(Path(folder), library)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def call(name: str, *arguments: Any) -> Any:
    """The CUDA implementation of op `name`, on tensors of any device."""
    return getattr(torch.ops.depthprune, name).default._op_dk(torch._C.DispatchKey.CUDA, *arguments)
