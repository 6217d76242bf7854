"""The CPU kernels of rotary, kv_write and silu_mul against plain torch: equal bits where torch rounds the same way."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from built import built
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime import ops
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.ops import implementations
from depthprune_runtime.ops._library import REFERENCES
from depthprune_runtime.spec import RopeSpec

built()

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
rotary = torch.ops.depthprune.rotary.default
kv_write = torch.ops.depthprune.kv_write.default
silu_mul = torch.ops.depthprune.silu_mul.default


def draw(seed, *shape, dtype=torch.float32):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("name", ["rotary", "kv_write", "silu_mul"])
def test_the_extension_serves_the_cpu(name):
    assert implementations(name)["CPU"] == "native"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 7), st.integers(1, 3), st.sampled_from([2, 10, 32, 64, 72]),
    st.sampled_from(DTYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_rotary_is_torch_bit_for_bit(tokens, heads, kv_heads, dim, dtype, seed):
    positions = torch.randint(0, 300, (tokens,), generator=torch.Generator().manual_seed(seed))
    table = RotaryTable(RopeSpec(), dim, torch.device("cpu")).rows(300)
    packed = draw(seed, tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    expected = packed.clone()
    REFERENCES["rotary"](*expected.split((heads, kv_heads, kv_heads), dim=1)[:2], table, positions)
    rotary(*packed.split((heads, kv_heads, kv_heads), dim=1)[:2], table, positions)
    assert torch.equal(packed, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 4, 16]), st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)  # fmt: skip
def test_kv_write(tokens, kv_heads, dim, page, dtype, seed):
    packed = draw(seed, tokens, 2 + 2 * kv_heads, dim, dtype=dtype)
    _, k, v = packed.split((2, kv_heads, kv_heads), dim=1)
    blocks = tokens // page + 2
    slots = torch.randperm(blocks * page, generator=torch.Generator().manual_seed(seed))[:tokens]
    caches = [draw(seed + i, blocks, page, kv_heads, dim, dtype=dtype) for i in range(2)]
    expected = [cache.clone() for cache in caches]
    REFERENCES["kv_write"](k, v, *expected, slots)
    kv_write(k, v, *caches, slots)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


def test_kv_write_with_more_threads_and_bytes_than_the_grain():
    k, v = draw(0, 700, 3, 64), draw(1, 700, 3, 64)
    slots = torch.randperm(50 * 16, generator=torch.Generator().manual_seed(2))[:700]
    caches = torch.zeros(2, 50, 16, 3, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        kv_write(k, v, caches[0], caches[1], slots)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(caches[0].flatten(0, 1)[slots], k)
    assert torch.equal(caches[1].flatten(0, 1)[slots], v)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 300), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_silu_mul(tokens, size, dtype, seed):
    gate_up = 4 * draw(seed, tokens, 2 * size, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    truth = torch.nn.functional.silu(gate) * up
    assert_as_accurate(silu_mul(gate_up), REFERENCES["silu_mul"](gate_up), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_mul_rounds_as_torch_on_every_value(dtype):
    """All finite gates of a half-precision type: at most one in a thousand lies on the other side of a rounding."""
    gate = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = gate[torch.isfinite(gate)]
    gate_up = torch.stack([gate, torch.ones_like(gate)], dim=1)
    out, expected = silu_mul(gate_up), REFERENCES["silu_mul"](gate_up)
    visible = expected.float().abs() > 1e-35  # torch keeps subnormal exponentials, this op does not
    assert (out != expected)[visible].float().mean() < 1e-3
    torch.testing.assert_close(out.float(), expected.float(), rtol=8e-3, atol=1e-35)


def test_silu_mul_special_values():
    x = torch.tensor([[torch.nan, torch.inf, 200.0, -200.0, 0.0] + [1.0] * 5])
    out = silu_mul(x)[0]
    assert out[0].isnan()
    assert out[1:].tolist() == [torch.inf, 200.0, 0.0, 0.0]


def test_the_schemas():
    q, k, cache = draw(0, 3, 4, 8), draw(1, 3, 2, 8), draw(2, 4, 2, 2, 8)
    table = RotaryTable(RopeSpec(), 8, torch.device("cpu")).rows(16)
    slots = torch.tensor([5, 0, 2])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(rotary, (q, k, table, slots), test_utils=checks)
    torch.library.opcheck(kv_write, (k, k.clone(), cache, cache.clone(), slots), test_utils=checks)
    torch.library.opcheck(silu_mul, (draw(3, 3, 8, dtype=torch.bfloat16),), test_utils=checks)


def test_errors_name_the_argument():
    q, k, cache, table = draw(0, 3, 4, 8), draw(1, 3, 2, 8), draw(2, 4, 2, 2, 8), draw(3, 16, 2, 4)
    slots = torch.tensor([5, 0, 2])
    with pytest.raises(ValueError, match=r"rotary: expected positions of values from 0 to 15, got 16 at index 1"):
        rotary(q, k, table, torch.tensor([1, 16, 2]))
    with pytest.raises(ValueError, match=r"rotary: expected cos_sin of shape \[S, 2, 4\], got \[16, 2, 3\]"):
        rotary(q, k, table[..., :3], slots)
    with pytest.raises(ValueError, match=r"rotary: expected k of dtype Float \(that of q\), got Half"):
        rotary(q, k.half(), table, slots)
    with pytest.raises(ValueError, match=r"kv_write: expected slot_mapping of slots from 0 to 7, got -1 at index 2"):
        kv_write(k, k, cache, cache, torch.tensor([5, 0, -1]))
    with pytest.raises(ValueError, match=r"kv_write: expected k_cache of shape \[N, P, 2, 8\]"):
        kv_write(k, k, cache[..., :7], cache, slots)
    with pytest.raises(ValueError, match=r"kv_write: expected slot_mapping of shape \[3\], got \[2\]"):
        kv_write(k, k, cache, cache, slots[:2])
    with pytest.raises(ValueError, match=r"silu_mul: expected gate_up of shape \[T, 2F\], got \[3, 7\]"):
        silu_mul(draw(0, 3, 7))
    with pytest.raises(ValueError, match=r"silu_mul: expected gate_up of dtype .* got Double"):
        silu_mul(draw(0, 3, 8).double())


def test_rotary_of_no_heads_is_nothing_to_do() -> None:
    empty, table = torch.empty(3, 0, 8), torch.ones(5, 2, 4)
    ops.rotary(empty, empty.clone(), table, torch.tensor([0, 1, 2]))
    k = torch.ones(3, 1, 8)
    ops.rotary(empty, k, table, torch.tensor([0, 1, 2]))
    assert not torch.equal(k, torch.ones(3, 1, 8)), "keys without queries are rotated"
