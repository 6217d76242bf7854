"""Micro-benchmarks of single ops and of a decode step, under pytest-benchmark.

    pytest benchmarks/ --benchmark-json after.json     # --benchmark-disable: each once, nothing timed
    python benchmarks/compare.py before.json after.json

Five takes of the whole suite (conftest.py). `control` is torch's own work, which no change of ours touches: what it
differs by between two files is the machine.

Shapes are SmolLM2-135M's, weights random and, but for the head, small enough to stay in a large cache: they compare
versions of the code, and say nothing about memory bandwidth. On CUDA, where there is a device, a call ends with the
device's work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from public_models import SPECS, shortened
from random_decode_step import decode_step, quantized, random_weights

from depthprune_runtime import ops
from depthprune_runtime.weights.panels import PanelWeight, panels_pay, to_panels
from depthprune_runtime.weights.quantized import QuantSpec

pytestmark = pytest.mark.benchmark(max_time=0.2, min_rounds=5)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROJECTIONS = {"qkv": (960, 576), "gate_up": (3072, 576), "down": (576, 1536), "lm_head": (49152, 576)}
PRECISIONS = {"bf16": None, "int8": QuantSpec(8, 64), "int4": QuantSpec(4, 32)}
H, K, D, PAGE = 9, 3, 64, 16  # heads, KV heads, head_dim, tokens of a kv_block


def timed(benchmark: Any, device: str, run: Callable[[], Tensor]) -> Tensor:
    """The result of `run`, which is timed until the device is done."""

    def call() -> Tensor:
        with torch.inference_mode():
            out = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return benchmark(call)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [192, 4096])
def test_control(benchmark: Any, device: str, size: int) -> None:
    """A product in cache, and one of 32 MB by a vector."""
    x = torch.ones(size, size if size < 1000 else 1, device=device, dtype=torch.bfloat16)
    weight = torch.ones(size, size, device=device, dtype=torch.bfloat16)
    assert timed(benchmark, device, lambda: weight @ x).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 512])
def test_rms_norm(benchmark: Any, device: str, tokens: int) -> None:
    x, weight = (torch.randn(shape, device=device).bfloat16() for shape in ((tokens, 576), (576,)))
    assert timed(benchmark, device, lambda: ops.rms_norm(x, weight, 1e-5)).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_linear(benchmark: Any, device: str, name: str, precision: str) -> None:
    """One token by one matrix."""
    rows, columns = PROJECTIONS[name]
    x, quant = torch.randn(1, columns, device=device).bfloat16(), PRECISIONS[precision]
    weight = torch.randn(rows, columns).mul_(0.02).bfloat16()
    if quant is None:
        dense = weight.to(device)
        panels = PanelWeight(to_panels(weight), rows, columns) if device == "cpu" and panels_pay() else None
        out = timed(benchmark, device, lambda: ops.panel_linear(x, panels) if panels else ops.linear(x, dense))
    else:
        small = quantized(weight, quant).to(torch.device(device), torch.bfloat16)
        out = timed(benchmark, device, lambda: ops.quantized_linear(x, small))
    assert out.shape == (1, rows) and out.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "context"), [(1, 128), (1, 1024), (8, 1024)])
def test_paged_attention(benchmark: Any, device: str, batch: int, context: int) -> None:
    pages = context // PAGE
    q = torch.randn(batch, H, D, device=device).bfloat16()
    keys, values = (torch.randn(batch * pages, PAGE, K, D, device=device).bfloat16() for _ in range(2))
    tables = torch.arange(batch * pages, device=device).view(batch, pages)
    lengths = torch.full((batch,), context, device=device)
    starts = torch.arange(batch + 1, device=device)
    out = timed(benchmark, device, lambda: ops.paged_attention(q, keys, values, tables, lengths, starts, scale=D**-0.5))
    assert out.shape == q.shape and out.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("blocks", [4, 3])
def test_decode_step(benchmark: Any, device: str, precision: str, blocks: int) -> None:
    """Of the first blocks of SmolLM2, with its head, at batch 1."""
    spec = shortened(SPECS["smollm2-135m"], 30 - blocks)
    if device == "cuda" and precision != "bf16":
        pytest.skip("quantised weights run as plain torch on a GPU")
    step = decode_step(spec, random_weights(spec, PRECISIONS[precision], device), device=device)
    assert timed(benchmark, device, step).isfinite().all()
