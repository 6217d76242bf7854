"""The Triton norms compile for each supported architecture, without a GPU, and keep their values in registers.

The gates are stack and local memory, not register counts: those change with every Triton release.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: ahead-of-time compilation is not checked")

from ahead_of_time import Launch, check, record

from depthprune_runtime.kernels import norm


def launch_of(op: str, dtype: torch.dtype, hidden_size: int, capability: int) -> Launch:
    x = torch.empty(1024, hidden_size, dtype=dtype, device="meta")
    weight = torch.empty(hidden_size, dtype=dtype, device="meta")
    if op == "rms_norm":
        (launch,) = record(lambda: norm.rms_norm(x, weight, 1e-5), capability)
    else:
        (launch,) = record(lambda: norm.add_rms_norm(x, torch.empty_like(x), weight, 1e-5), capability)
    return launch


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize(
    ("dtype", "hidden_size"),
    [
        (torch.bfloat16, 128),
        (torch.bfloat16, 576),
        (torch.float16, 4096),
        (torch.float32, 4096),
        (torch.bfloat16, 577),
        (torch.bfloat16, 16384),
        (torch.float32, 16384),
    ],
)
def test_no_spills(op: str, dtype: torch.dtype, hidden_size: int, capability: int, tmp_path: Path) -> None:
    launch = launch_of(op, dtype, hidden_size, capability)
    check(launch, capability, tmp_path, vector_loads=hidden_size == 4096 and dtype != torch.float32)
