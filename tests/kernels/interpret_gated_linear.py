"""The Triton gated projection on CPU tensors; run by test_interpret.py with TRITON_INTERPRET=1.

float32 and float16 only: the interpreter multiplies the bit patterns of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor

from depthprune_runtime.kernels import gated_linear
from depthprune_runtime.ops._library import REFERENCES
from depthprune_runtime.ops._triton import implementation

DTYPES = [torch.float16, torch.float32]
SHAPES = [(1, 72, 40), (17, 128, 96), (130, 72, 40), (33, 31, 17), (5, 1, 1), (70, 64, 32)]  # T, C, F


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(rows: int, size: int, dtype: torch.dtype, seed: int, scale: float = 1.0, outlier: bool = False) -> Tensor:
    """Random rows inside a tensor of NaN, with more of it before, behind and beside: a read beyond a row shows."""
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale
    if outlier:
        x[:, size // 3] *= 1000
    wide = torch.full((rows + 2, size + 8), torch.nan, dtype=dtype)
    wide[1:-1, 3 : 3 + size] = x.to(dtype)
    return wide[1:-1, 3 : 3 + size]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    tokens, hidden_size, channels = shape
    x = draw(tokens, hidden_size, dtype, seed=0, scale=0.3, outlier=True)
    weight = draw(2 * channels, hidden_size, dtype, seed=1, scale=hidden_size**-0.5 / 10)
    return x, weight, draw(1, 2 * channels, dtype, seed=2)[0] if bias else None


def truth_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    both = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_linear(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    given = inputs(shape, dtype, bias)
    out = gated_linear.gated_linear(*given)
    assert_as_accurate(out, REFERENCES["gated_linear"](*given), truth_of(*given))
    assert torch.equal(out, gated_linear.gated_linear(*given))


def test_a_token_does_not_depend_on_the_others() -> None:
    x, weight, _ = inputs((40, 72, 40), torch.float16)
    alone = torch.cat([gated_linear.gated_linear(row, weight, None) for row in x[:3].split(1)])
    assert torch.equal(gated_linear.gated_linear(x, weight, None)[:3], alone)


def test_transposed_operands() -> None:
    x, weight, bias = inputs((18, 33, 20), torch.float32, bias=True)
    assert bias is not None
    out = gated_linear.gated_linear(x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2])
    assert torch.equal(out, gated_linear.gated_linear(x, weight, bias))


def test_gates_far_from_zero() -> None:
    """silu(-1e4) is 0 and silu(1e4) is 1e4, though exp(1e4) is infinite."""
    x = torch.eye(2, 16)
    weight = torch.zeros(4, 16)
    weight[0, :2] = torch.tensor([-1e4, 1e4])
    weight[2:, :2] = 1.0
    assert gated_linear.gated_linear(x, weight, None)[:, 0].tolist() == [0.0, 1e4]


def test_few_tokens_and_float32_take_the_reference() -> None:
    chosen = implementation("gated_linear")
    for tokens, dtype in ((64, torch.float16), (70, torch.float32)):
        given = inputs((tokens, 72, 40), dtype)
        assert torch.equal(chosen(*given), REFERENCES["gated_linear"](*given))
    given = inputs((65, 72, 40), torch.float16)
    assert torch.equal(chosen(*given), gated_linear.gated_linear(*given))
    assert not torch.equal(chosen(*given), REFERENCES["gated_linear"](*given)), "they round differently"


def test_no_tokens() -> None:
    assert gated_linear.gated_linear(torch.empty(0, 72), torch.empty(80, 72), None).shape == (0, 40)


def test_errors_name_the_argument() -> None:
    x, weight = torch.ones(2, 8), torch.ones(6, 8)
    with pytest.raises(ValueError, match=r"gated_linear: expected weight of shape \[2F, 8\], got \[5, 8\]"):
        gated_linear.gated_linear(x, weight[:5], None)
    with pytest.raises(ValueError, match=r"gated_linear: expected weight of shape \[2F, 8\], got \[6, 7\]"):
        gated_linear.gated_linear(x, weight[:, :7], None)
    with pytest.raises(ValueError, match=r"gated_linear: expected bias of shape \[6\], got \[3\]"):
        gated_linear.gated_linear(x, weight, torch.ones(3))
    with pytest.raises(ValueError, match=r"gated_linear: expected x of shape \[T, C\], got \[1, 2, 8\]"):
        gated_linear.gated_linear(x[None], weight, None)
    with pytest.raises(ValueError, match=r"gated_linear: expected x of dtype .*, got torch.float64"):
        gated_linear.gated_linear(x.double(), weight, None)
    with pytest.raises(ValueError, match=r"gated_linear: expected weight torch.float32 on cpu like x"):
        gated_linear.gated_linear(x, weight.half(), None)
