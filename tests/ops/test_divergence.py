"""The C++ divergence against float64, on every instruction set, near and far."""

from __future__ import annotations

import pytest
import torch
from built import built
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime import ops
from depthprune_runtime.ops import implementations
from depthprune_runtime.ops._library import REFERENCES

built()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def test_the_extension_serves_the_cpu():
    assert implementations("js_reverse")["CPU"] == "native"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5), st.sampled_from([1, 2, 17, 1000, 1025, 5000]), st.sampled_from(DTYPES),
    st.sampled_from([1e-4, 1e-2, 1.0, 8.0]), st.integers(0, 2**31),
)  # fmt: skip
def test_js_reverse(rows, size, dtype, apart, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = 4 * torch.randn(rows, size, generator=generator)
    pruned = (dense + apart * torch.randn(rows, size, generator=generator)).to(dtype)
    dense = dense.to(dtype)
    truth = REFERENCES["js_reverse"](dense.double(), pruned.double())
    torch.testing.assert_close(ops.js_reverse(dense, pruned).double(), truth, rtol=2e-5, atol=2e-9)


def test_equal_rows_are_zero_apart_and_strides_are_read():
    x = torch.randn(6, 300).t()[:, ::2]
    assert ops.js_reverse(x, x.clone()).tolist() == [0.0] * 300
    torch.testing.assert_close(ops.js_reverse(x, -x), REFERENCES["js_reverse"](x, -x))


def test_what_is_not_finite_shows():
    dense, pruned = torch.randn(2, 50), torch.randn(2, 50)
    pruned[1, 7] = torch.nan
    assert ops.js_reverse(dense, pruned).isnan().tolist() == [False, True]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"js_reverse: expected pruned of shape \[2, 5\] in Float"):
        ops.js_reverse(torch.ones(2, 5), torch.ones(2, 4))
    with pytest.raises(ValueError, match="js_reverse: expected dense of dtype bfloat16, float16 or float32"):
        ops.js_reverse(torch.ones(2, 5).double(), torch.ones(2, 5).double())
