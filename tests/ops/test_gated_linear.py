"""The gated projection: the two ops that it is made of, bit for bit, or a matrix product of its own on the CPU."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from op_cases import plain

from depthprune_runtime import ops

gated_linear = torch.ops.depthprune.gated_linear.default


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        *((tokens, dtype) for tokens in (1, 64) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        (300, torch.float16),
        (300, torch.float32),
    ],
)
def test_it_is_silu_mul_of_linear(tokens, dtype):
    x, weight, bias = draw(0, tokens, 72, dtype=dtype), draw(1, 80, 72, dtype=dtype), draw(2, 80, dtype=dtype)
    for given in (None, bias):
        assert torch.equal(ops.gated_linear(x, weight, given), ops.silu_mul(ops.linear(x, weight, given)))


@pytest.mark.parametrize("shape", [(65, 40, 72), (130, 33, 97), (128, 1536, 576)])
def test_many_tokens_in_bfloat16(shape):
    tokens, channels, size = shape
    x = draw(0, tokens, size, dtype=torch.bfloat16)
    weight = draw(1, 2 * channels, size, dtype=torch.bfloat16) * 0.1
    bias = draw(2, 2 * channels, dtype=torch.bfloat16)
    for given in (None, bias):
        arguments = (x, weight, given)
        truth = plain("gated_linear")(*(None if a is None else a.double() for a in arguments))
        assert_as_accurate(gated_linear(*arguments), plain("gated_linear")(*arguments), truth, "gated_linear")


def test_extreme_gates():
    """silu of what overflows or vanishes in between: x, zero, and NaN where the gate is."""
    gates = torch.tensor([1e30, -1e30, 88.0, -88.0, -104.0, float("inf"), float("nan"), 0.0], dtype=torch.bfloat16)
    x = torch.ones(65, 1, dtype=torch.bfloat16)
    weight = torch.cat([gates, torch.ones(8, dtype=torch.bfloat16)])[:, None]
    out = gated_linear(x, weight, None)
    expected = torch.nn.functional.silu(gates.double()).bfloat16().expand(65, -1)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-2, atol=1e-30)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"gated_linear: expected weight of shape \[2F, K\], got \[3, 8\]"):
        gated_linear(torch.ones(2, 8), torch.ones(3, 8), None)
    with pytest.raises(ValueError, match=r"gated_linear: expected weight of shape \[N, 8\], got \[4, 7\]"):
        gated_linear(torch.ones(2, 8), torch.ones(4, 7), None)


def test_the_schema():
    args = (draw(0, 3, 8), draw(1, 12, 8), None)
    torch.library.opcheck(gated_linear, args, test_utils=("test_schema", "test_faketensor"))
