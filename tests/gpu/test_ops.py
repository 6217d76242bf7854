"""Every op that has an implementation for CUDA devices, on the GPU, at the shapes of real models."""

from __future__ import annotations

import os

import pytest
import torch
from op_case import Case
from op_cases import CASES, verify

from depthprune_runtime.ops import implementations
from depthprune_runtime.ops._library import REFERENCES
from depthprune_runtime.ops._triton import LAUNCHERS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("all_threads"),  # truth is float64 on the CPU, for large shapes seconds on every core
]

NATIVE = [op for op in REFERENCES if implementations(op)["CUDA"] == "native"]
# What a GPU must have a kernel for: from Triton, and from C++ unless that was left out on purpose.
EXPECTED = {*LAUNCHERS, *(() if os.environ.get("DEPTHPRUNE_NO_CUDA") == "1" else ("head_rms_norm", "rotary"))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [case for op in CASES for case in CASES[op]], ids=str)
def test_op(case: Case, dtype: torch.dtype) -> None:
    if case.op not in NATIVE:
        assert case.op not in EXPECTED, f"{case.op} runs as plain torch: its kernel was not built or not loaded"
        pytest.skip(f"{case.op} has no kernel for CUDA devices")
    verify(case, dtype, torch.device("cuda"))


def test_the_kernels_are_bound() -> None:
    assert set(NATIVE) >= EXPECTED


def test_every_implementation_has_cases() -> None:
    missing = [op for op in NATIVE if op not in CASES]
    assert not missing, f"tests/helpers/op_cases.py: add a line for each of {missing}"
