"""Compiles exactly what a launcher would launch, for GPUs that need not be there.

    launches = record(lambda: norm.rms_norm(x, weight, eps), capability=90)    # x, weight: meta tensors, no memory
    check(launches[0], 90, tmp_path, vector_loads=True)

`record` runs the launcher with Triton's run replaced: the kernel, its arguments and options are kept, nothing is
launched. The signature then follows Triton's own specialisation: integers that are 1 are constants, integers and
addresses that are multiples of 16 are marked so (without it other code is compiled than runs).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}
# of Triton's launch, no arguments of the kernel
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl")
_LOADS = re.compile(r"\b(LDG\.E\.[\w.]*128|LDGSTS\.E\.[\w.]*128|UTMALDG|UBLKCP)")


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def record(call: Callable[[], Any], capability: int) -> list[Launch]:
    """The launches of `call`, configured for `capability` (80, 90, ...); its tensors may be on the meta device."""
    launches: list[Launch] = []

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for name, default in kernel.signature.parameters.items():
            if name not in arguments:
                arguments[name] = default.default
        launches.append(Launch(kernel, arguments, options, grid(arguments) if callable(grid) else grid))

    modules = [m for name, m in sys.modules.items() if name.startswith("depthprune_runtime.kernels.")]
    patches = [
        mock.patch.object(m, "capability_of", lambda _: divmod(capability, 10))
        for m in modules
        if hasattr(m, "capability_of")
    ]
    with mock.patch.object(JITFunction, "run", run):
        for patch in patches:
            patch.start()
        try:
            call()
        finally:
            for patch in patches:
                patch.stop()
    return launches


def compile_launch(launch: Launch, capability: int) -> Any:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            # A meta tensor begins where its offset says: allocations themselves are aligned.
            start = value.data_ptr() if value.device.type != "meta" else value.storage_offset() * value.element_size()
            aligned = start % 16 == 0
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = specialised and value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def cuobjdump(compiled: Any, folder: Path, option: str) -> str:
    """What the cuobjdump that comes with Triton says about a compiled kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([TOOLS / "cuobjdump", option, cubin], check=True, capture_output=True, text=True).stdout


def check(launch: Launch, capability: int, folder: Path, vector_loads: bool = False) -> Any:
    """Compile; fail where values leave the registers, shared memory is too much, or no load takes 16 bytes."""
    compiled = compile_launch(launch, capability)
    what = f"{launch.name} sm_{capability} {launch.options}"
    usage = cuobjdump(compiled, folder, "-res-usage")
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, f"{what}: {usage}"
    code = cuobjdump(compiled, folder, "-sass")
    assert not re.search(r"\b(LDL|STL)\b", code), f"{what}: local memory in its code"
    assert compiled.metadata.shared <= SHARED_LIMIT[capability], f"{what}: {compiled.metadata.shared} bytes of shared"
    if vector_loads:
        assert _LOADS.search(code), f"{what}: no 128-bit loads"
    return compiled
