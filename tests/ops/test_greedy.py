"""The most likely token, and rows that are damaged."""

from __future__ import annotations

import pytest
import torch

from depthprune_runtime import ops
from depthprune_runtime.ops._library import REFERENCES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 1024, 1025, 49152])
def test_the_first_of_the_largest(dtype, size):
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    logits[0] = -3.0  # all equal
    logits[1, size // 2] = 100.0
    logits[2, 0] = -float("inf")
    logits[3, size - 1] = 100.0
    found = ops.greedy(logits)
    for row, token in zip(logits, found.tolist(), strict=True):
        if row.max() > -float("inf"):
            assert token == int((row == row.max()).nonzero()[0])
    assert found.dtype == torch.int64


@pytest.mark.parametrize("place", [0, 3, 1500])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_rows(bad, place):
    logits = torch.randn(3, 2000)
    logits[1, place] = bad
    logits[2] = -float("inf")
    for run in (ops.greedy, REFERENCES["greedy"]):
        tokens = run(logits)
        assert tokens.tolist() == [int(logits[0].argmax()), -1, -1]


def test_strided_rows_and_none():
    logits = torch.randn(40, 6)
    assert torch.equal(ops.greedy(logits.T), logits.T.argmax(-1))
    assert torch.equal(ops.greedy(logits[::2]), logits[::2].argmax(-1))
    assert ops.greedy(logits[:0]).shape == (0,)
    torch.library.opcheck(torch.ops.depthprune.greedy.default, (logits,), test_utils=("test_schema", "test_faketensor"))
