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
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def compile_norm(op: str, dtype: str, hidden_size: int, capability: int) -> Any:
    """Compile as the launcher does for contiguous tensors: `inner` is 1, pointers are aligned to 16 bytes."""
    kernel = {"rms_norm": norm.rms_norm_kernel, "add_rms_norm": norm.add_rms_norm_kernel}[op]
    config = launch.launch_config(op, (1024, hidden_size), (capability // 10, capability % 10))
    constants = {"BLOCK_ROWS": config.block_rows, "BLOCK_SIZE": config.block_size}
    constants |= {name: 1 for name in kernel.arg_names if name.endswith("_inner")}
    multiples = {"num_rows": 1024, "hidden_size": hidden_size, "outer_stride": hidden_size, "inner_stride": 0}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "eps":
            signature[name] = "fp32"
        else:
            pointer = name.endswith("_ptr")
            signature[name] = f"*{dtype}" if pointer else "i32"
            # As the launcher's arguments are specialised; without it other code is compiled than runs.
            if pointer or any(name.endswith(key) and value % 16 == 0 for key, value in multiples.items()):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def cuobjdump(compiled: Any, folder: Path, option: str) -> str:
    """What the cuobjdump that comes with Triton says about a compiled kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([TOOLS / "cuobjdump", option, cubin], check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize(
    ("dtype", "hidden_size"),
    [("bf16", 128), ("bf16", 576), ("fp16", 4096), ("fp32", 4096), ("bf16", 577), ("bf16", 16384), ("fp32", 16384)],
)
def test_no_spills(op: str, dtype: str, hidden_size: int, capability: int, tmp_path: Path) -> None:
    compiled = compile_norm(op, dtype, hidden_size, capability)
    usage = cuobjdump(compiled, tmp_path, "-res-usage")
    assert "STACK:0 " in usage, usage
    assert "LOCAL:0 " in usage, usage
    assert not re.search(r"\b(LDL|STL)\b", cuobjdump(compiled, tmp_path, "-sass"))
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_aligned_rows_load_16_bytes(op: str, tmp_path: Path) -> None:
    compiled = compile_norm(op, "bf16", 4096, 90)
    assert re.search(r"LDG\.E\.[\w.]*128", cuobjdump(compiled, tmp_path, "-sass"))
