"""Builds the C++ extension with sanitizers and runs its tests: `make sanitize`.

address, undefined: the extension as a whole, under the Python tests of ops and of the decode step.
thread: the decode step alone with plain threads (decode_step_threads.cpp); OpenMP's cannot be followed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent.parent
PRELOAD = ("libasan.so", "libstdc++.so")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", "-Wall", "-DDEPTHPRUNE_SANITIZE"]


def compile_all(sources: list[Path], folder: Path, flags: list[str]) -> list[Path]:
    """Object files of `sources`, one compiler a core."""
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{ROOT / 'csrc'}", f"-I{sysconfig.get_paths()['include']}"]
    includes += [f"-isystem{path}" for path in cpp_extension.include_paths()]

    def one(source: Path) -> Path:
        target = folder / f"{'-'.join(source.relative_to(ROOT).with_suffix('').parts)}.o"
        subprocess.run(["g++", *flags, *includes, "-fPIC", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def link(objects: list[Path], target: Path, flags: list[str], libraries: list[str]) -> None:
    paths = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    names = [f"-l{name}" for name in libraries]
    subprocess.run(["g++", *flags, *map(str, objects), "-o", str(target), *paths, *names], check=True)


def core() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").glob("*/*.cpp"))


def thread() -> int:
    folder = ROOT / "build" / "sanitize-thread"
    flags = [*FLAGS, "-fsanitize=thread", "-DDEPTHPRUNE_STD_THREADS", "-fopenmp-simd"]
    sources = [p for p in core() if p.stem != "binding"] + [ROOT / "tests/native/decode_step_threads.cpp"]
    program = folder / "decode_step_threads"
    link(compile_all(sources, folder, flags), program, flags, ["torch_cpu", "c10"])
    return subprocess.run([str(program)], check=False, env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}).returncode


def address() -> int:
    folder = ROOT / "build" / "sanitize-address"
    flags = [*FLAGS, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fopenmp"]
    flags.append("-DTORCH_EXTENSION_NAME=_C")
    package = folder / "package" / "depthprune_runtime"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "depthprune_runtime", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    objects = compile_all([ROOT / "csrc" / "module.cpp", *core()], folder, flags)
    target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    link(objects, target, [*flags, "-shared"], ["torch_python", "torch_cpu", "torch", "c10"])
    # libstdc++ too: libasan looks for its __cxa_throw before Python has loaded it
    found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in PRELOAD]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they allocate until the end
        "PYTHONPATH": str(package.parent),
        "PYTHONMALLOC": "malloc",
    }
    tests = ["tests/ops", "tests/model/test_decode_step.py"]
    check = "import depthprune_runtime._C as c, sys; sys.exit(c.__file__ != sys.argv[1])"
    subprocess.run([sys.executable, "-P", "-c", check, str(target)], env=environment, check=True)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    codes = [{"thread": thread, "address": address}[name]() for name in sys.argv[1:] or ("thread", "address")]
    sys.exit(int(any(codes)))  # a signal's is negative
