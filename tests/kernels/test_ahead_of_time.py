"""Every Triton kernel compiles for each supported architecture, without a GPU, and keeps its values in registers.

The gates are stack and local memory, not register counts: those change with every Triton release.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: ahead-of-time compilation is not checked")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from depthprune_runtime.kernels import launch, norm  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def compile_norm(op: str, dtype: str, hidden_size: int, capability: int) -> Any:
    """Compile as the launcher does for contiguous tensors: `inner` is 1, pointers are aligned to 16 bytes."""
    kernel = {"rms_norm": norm.rms_norm_kernel, "add_rms_norm": norm.add_rms_norm_kernel}[op]
    config = launch.launch_config(op, (1024, hidden_size), (capability // 10, capability % 10))
    constants = {"BLOCK_ROWS": config.block_rows, "BLOCK_SIZE": config.block_size}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_inner"):
            signature[name] = "constexpr"
            constants[name] = 1
        elif name == "eps":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name == "hidden_size" or name.endswith("outer_stride"):
                divisible = hidden_size % 16 == 0
            else:
                divisible = name in ("num_rows",) or name.endswith("inner_stride")
            if divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local bytes of a kernel, from the cuobjdump that comes with Triton."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


def sass(compiled: Any, folder: Path) -> str:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize(
    ("dtype", "hidden_size"),
    [("bf16", 128), ("bf16", 576), ("fp16", 4096), ("fp32", 4096), ("bf16", 577), ("bf16", 32768), ("fp32", 32768)],
)
def test_no_spills(op: str, dtype: str, hidden_size: int, capability: int, tmp_path: Path) -> None:
    compiled = compile_norm(op, dtype, hidden_size, capability)
    used = resources(compiled, tmp_path)
    print(op, dtype, hidden_size, capability, used)
    assert used["STACK"] == 0, used
    assert used["LOCAL"] == 0, used
    assert not re.search(r"\b(LDL|STL)\b", sass(compiled, tmp_path))
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_aligned_rows_load_16_bytes(op: str, tmp_path: Path) -> None:
    assert re.search(r"LDG\.E\.[\w.]*128", sass(compile_norm(op, "bf16", 4096, 90), tmp_path))
