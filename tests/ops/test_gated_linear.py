"""The gated projection without a kernel of its own: the two ops that it is made of, bit for bit."""

from __future__ import annotations

import pytest
import torch

from depthprune_runtime import ops

gated_linear = torch.ops.depthprune.gated_linear.default


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_it_is_silu_mul_of_linear(tokens, dtype):
    x, weight, bias = draw(0, tokens, 72, dtype=dtype), draw(1, 80, 72, dtype=dtype), draw(2, 80, dtype=dtype)
    for given in (None, bias):
        assert torch.equal(ops.gated_linear(x, weight, given), ops.silu_mul(ops.linear(x, weight, given)))


def test_the_schema():
    args = (draw(0, 3, 8), draw(1, 12, 8), None)
    torch.library.opcheck(gated_linear, args, test_utils=("test_schema", "test_faketensor"))
