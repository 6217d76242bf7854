"""rotary_kv_write: the three ops it stands for, and the slots it leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.spec import RopeSpec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6
rotary_kv_write = torch.ops.depthprune.rotary_kv_write.default


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table(dim: int, size: int = 64) -> Tensor:
    return RotaryTable(RopeSpec(), dim, torch.device("cpu")).rows(size)


def slots_of(tokens: int, slots: int, seed: int) -> Tensor:
    """Distinct slots; every third token has none."""
    found = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))[:tokens]
    found[::3] = -1
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 5), st.integers(1, 3), st.sampled_from([2, 10, 64]), st.sampled_from([1, 4, 16]),
    st.booleans(), st.sampled_from(DTYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_it_is_the_three_ops(tokens, heads, kv_heads, dim, page, normed, dtype, seed):
    packed = draw(seed, tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    sizes = (heads, kv_heads, kv_heads)
    gains = (draw(1, heads, dim, dtype=dtype), draw(2, kv_heads, dim, dtype=dtype)) if normed else (None, None)
    positions = torch.randint(0, 64, (tokens,), generator=torch.Generator().manual_seed(seed))
    blocks = tokens // page + 1
    slots = slots_of(tokens, blocks * page, seed)
    caches = [draw(seed + i, blocks, page, kv_heads, dim, dtype=dtype) for i in (1, 2)]

    expected, expected_caches = packed.clone(), [cache.clone() for cache in caches]
    q, k, v = expected.split(sizes, dim=1)
    for x, gain in zip((q, k), gains, strict=True):
        if gain is not None:
            ops.head_rms_norm(x, gain, EPS)
    ops.rotary(q, k, table(dim), positions)
    for token in range(tokens):
        if slots[token] >= 0:
            block, offset = divmod(int(slots[token]), page)
            expected_caches[0][block, offset] = k[token]
            expected_caches[1][block, offset] = v[token]

    ops.rotary_kv_write(*packed.split(sizes, dim=1), *gains, EPS, table(dim), positions, *caches, slots)
    assert torch.equal(packed, expected)
    assert torch.equal(caches[0], expected_caches[0])
    assert torch.equal(caches[1], expected_caches[1])


def test_no_slot_at_all_writes_nothing():
    q, k, cache = draw(0, 2, 3, 8), draw(1, 2, 1, 8), torch.full((1, 4, 1, 8), 7.0)
    other = cache.clone()
    positions = torch.tensor([0, 5])
    ops.rotary_kv_write(q, k, k.clone(), None, None, EPS, table(8), positions, cache, other, torch.tensor([-1, -9]))
    assert (cache == 7).all()
    assert (other == 7).all()


@pytest.mark.parametrize("normed", [False, True])
def test_the_schema(normed):
    q, k, v, cache = draw(0, 3, 4, 8), draw(1, 3, 2, 8), draw(2, 3, 2, 8), draw(3, 4, 2, 2, 8)
    gains = (draw(4, 4, 8), draw(5, 2, 8)) if normed else (None, None)
    arguments = (
        q,
        k,
        v,
        *gains,
        EPS,
        table(8),
        torch.tensor([3, 0, 2]),
        cache,
        cache.clone(),
        torch.tensor([5, -1, 2]),
    )
    torch.library.opcheck(rotary_kv_write, arguments, test_utils=("test_schema", "test_faketensor"))


def test_errors_name_the_argument():
    q, k, cache = draw(0, 3, 4, 8), draw(1, 3, 2, 8), draw(3, 4, 2, 2, 8)
    positions, slots = torch.tensor([3, 0, 2]), torch.tensor([5, 0, 2])

    def call(v=k, q_norm=None, k_norm=None):
        ops.rotary_kv_write(q, k, v, q_norm, k_norm, EPS, table(8), positions, cache, cache.clone(), slots)

    with pytest.raises(ValueError, match=r"rotary_kv_write: expected q_norm of shape \[4, 8\], got \[8\]"):
        call(q_norm=torch.ones(8))
    with pytest.raises(ValueError, match=r"rotary_kv_write: expected k_norm of shape \[2, 8\], got \[4, 8\]"):
        call(k_norm=torch.ones(4, 8))
    with pytest.raises(ValueError, match=r"rotary_kv_write: expected v of shape \[3, 2, 8\] \(that of k\), got"):
        call(v=k[:, :1])
