"""The Triton norms on CPU tensors; run by test_interpret.py with TRITON_INTERPRET=1.

float32 and float16 only: the interpreter sums and compares the bit patterns of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor

from depthprune_runtime.kernels import norm
from depthprune_runtime.ops._library import REFERENCES

EPS = 1e-5
DTYPES = [torch.float16, torch.float32]
SHAPES = [(1, 576), (3, 1), (5, 7), (3, 577), (17, 64), (2, 1030)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random rows with one outlier channel, inside a wider tensor of NaN: a read beyond a row shows."""
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    x[:, size // 3] *= 1000
    wide = torch.full((rows, size + 3), torch.nan, dtype=dtype)
    wide[:, :size] = x.to(dtype)
    return wide[:, :size]


def true_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x.double(), weight.shape, weight.double(), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = draw(*shape, dtype), draw(1, shape[1], dtype, seed=5)[0]
    out = norm.rms_norm(x, weight, EPS)
    assert_as_accurate(out, REFERENCES["rms_norm"](x, weight, EPS), true_norm(x, weight))
    assert torch.equal(out, norm.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = draw(*shape, dtype), draw(*shape, dtype, seed=1), draw(1, shape[1], dtype, seed=5)[0]
    expected_residual, truth = residual + x, true_norm(x.double() + residual.double(), weight)
    baseline = REFERENCES["add_rms_norm"](x, residual.clone(), weight, EPS)
    out = norm.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, expected_residual)
    assert_as_accurate(out, baseline, truth)


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_heads_of_a_wider_projection(weight_dtype: torch.dtype) -> None:
    packed = torch.full((6, 5 * 24), torch.nan, dtype=torch.float16)
    packed[:, :72] = draw(6, 72, torch.float16)
    heads, weight = packed[:, :72].view(6, 3, 24), torch.linspace(0.5, 1.5, 24).to(weight_dtype)
    out = norm.rms_norm(heads, weight, EPS)
    assert_as_accurate(out, REFERENCES["rms_norm"](heads, weight, EPS), true_norm(heads, weight))


def test_strided_tensors() -> None:
    x, residual, weight = draw(6, 10, torch.float32), draw(6, 10, torch.float32, seed=1), torch.linspace(0.5, 2, 10)
    across = residual.t().contiguous().t()
    expected = norm.add_rms_norm(x, residual, weight, EPS)
    out = norm.add_rms_norm(x.t().contiguous().t(), across, weight.repeat_interleave(2)[::2], EPS)
    assert torch.equal(out, expected)
    assert torch.equal(across, residual)
    assert out.stride() == across.stride()


def test_no_tokens() -> None:
    x = torch.empty(0, 576)
    assert norm.rms_norm(x, torch.ones(576), EPS).shape == (0, 576)
    assert norm.add_rms_norm(x, x.clone(), torch.ones(576), EPS).shape == (0, 576)


def test_errors_name_the_argument() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of shape \[8\], got \[7\]"):
        norm.rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: expected x of dtype .*, got torch.float64"):
        norm.rms_norm(x.double(), torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: expected residual like x \[2, 8\]"):
        norm.add_rms_norm(x, torch.ones(1, 8), torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"norm: expected hidden_size in 1 \.\. 16384, got 20000"):
        norm.rms_norm(torch.ones(1, 20000), torch.ones(20000), EPS)
