"""Builds csrc/cuda for the CPU: the kernels over cuda_emulation.h and the bindings that see tensors, as one library.

Loading it registers the bindings under the key PrivateUse1, so that real CUDA kernels in the same process stay what
they are; `call` runs one or the other on CPU tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "native"
BUILD = ROOT / "build" / "cuda-emulation"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc" / "cuda").glob("*_binding.cpp"))
# Products and sums stay apart where the source says so, and a misaligned vector stops the process.
KERNEL_FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
KERNEL_FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
CONTROLS = """#include "cuda_emulation.h"
extern "C" void set_order(int order) { emulation_order = order; }
extern "C" void refuse_launches(bool refuse) { emulation_refuses = refuse; }
"""
# After the headers, so that only the bindings' own registrations change their key.
PREFIX = """#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
#define CUDA PrivateUse1
"""


@dataclass
class Target:
    """Where `call` runs; set by the fixture `target`."""

    gpu: bool = False


TARGET = Target()


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
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".inc") or p in BINDINGS]
    files += [*HERE.rglob("*.h"), Path(__file__)]
    found = hashlib.sha256(torch.__version__.encode())
    for path in sorted(files):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def compile_and_link(folder: Path, library: Path) -> None:
    emulated = [f"-I{HERE / 'emulated'}", f"-I{HERE}"]
    objects = [folder / f"{name}.o" for name in (*(path.stem for path in KERNELS), "bindings", "controls")]
    kernel_flags = [*KERNEL_FLAGS, *emulated, f"-I{ROOT / 'csrc'}"]
    for source, target in zip(KERNELS, objects, strict=False):
        gxx([*kernel_flags, "-x", "c++", "-c", str(source), "-o", str(target)])
    flags = ["-std=c++20", "-O0", *emulated, *torch_includes()]
    gxx([*flags, "-x", "c++", "-c", "-", "-o", str(objects[-2])], PREFIX + in_one(BINDINGS))
    gxx([*kernel_flags, "-x", "c++", "-c", "-", "-o", str(objects[-1])], CONTROLS)
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    unfinished = folder / "emulated.so"
    gxx(["-shared", *map(str, objects), "-o", str(unfinished), *paths, "-ltorch_cpu", "-lc10"])
    unfinished.replace(library)


def load() -> ctypes.CDLL:
    """The library, built once. `set_order` chooses in which order the threads of a block run."""
    import fcntl  # not on Windows, where the tests are skipped

    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"{digest()}.so"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test workers: one builds, the others wait
        if not library.exists():
            for stale in BUILD.glob("*.so"):
                stale.unlink()
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                compile_and_link(Path(folder), library)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def on_gpu(operator: Any, arguments: tuple[Any, ...], device: str = "cuda") -> Any:
    """The operator on copies of all storages, which keep strides, offsets and neighbours; then all copied back."""
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def whole(x: Tensor) -> Tensor:  # [bytes of the storage]
        return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.is_meta:
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = (whole(x), whole(x).to(device, copy=True))
        bytes_there = copies[storage.data_ptr()][1]
        there = torch.empty(0, dtype=x.dtype, device=device)
        return there.set_(bytes_there.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    out = operator(*map(moved, arguments))
    for here, there in copies.values():
        here.copy_(there)
    if out is None:
        return None
    return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype).copy_(out)


def call(name: str, *arguments: Any) -> Any:
    """The CUDA implementation of op `name`, emulated or on the GPU, on CPU tensors."""
    operator = getattr(torch.ops.depthprune, name).default
    if TARGET.gpu:
        return on_gpu(operator, arguments)
    return operator._op_dk(torch._C.DispatchKey.PrivateUse1, *arguments)
