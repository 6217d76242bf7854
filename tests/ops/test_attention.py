"""Attention, rotary and KV write: references against naive float64 formulas, and the op contract."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime import ops
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.ops.attention import _attend
from depthprune_runtime.spec import RopeSpec


def naive(q, k, v, scale, window):
    """Loops of float64 over one sequence; q are the last queries of k's positions."""
    num_queries, num_heads, _ = q.shape
    context, num_kv_heads, _ = k.shape
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for t in range(num_queries):
        position = context - num_queries + t
        first = max(0, position - window + 1) if window > 0 else 0
        for h in range(num_heads):
            group = h // (num_heads // num_kv_heads)
            scores = torch.stack([scale * q[t, h] @ k[s, group] for s in range(first, position + 1)])
            weights = scores.softmax(0)
            out[t, h] = (weights[:, None] * v[first : position + 1, group]).sum(0)
    return out


def draw(seed, *shape, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if values.numel():
        values.view(-1)[0] *= 50  # one outlier
    return values.to(dtype)


lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    lengths, st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 10]), st.integers(0, 8), st.integers(1, 5),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_paged_attention(requests, kv_heads, group, dim, window, page, shuffled, seed):
    """requests: (new tokens, tokens already cached). Pages lie in any order; free ones hold NaN."""
    new = [n for n, _ in requests]
    context = [n + c for n, c in requests]
    pages = [math.ceil(c / page) for c in context]
    order = list(range(sum(pages) + 2))
    if shuffled:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
    width = max(pages)
    tables, used = [], 0
    for count in pages:
        tables.append(order[used : used + count] + [0] * (width - count))
        used += count
    k_cache = torch.full((len(order), page, kv_heads, dim), float("nan"))
    v_cache = k_cache.clone()
    q = draw(seed, sum(new), kv_heads * group, dim)
    expected = []
    bounds = [0]
    for i, (n, length) in enumerate(zip(new, context, strict=True)):
        k, v = draw(seed + i, length, kv_heads, dim), draw(seed + 7 + i, length, kv_heads, dim)
        slots = torch.tensor([tables[i][p // page] * page + p % page for p in range(length)])
        ops.kv_write(k, v, k_cache, v_cache, slots)
        expected.append(naive(q[bounds[-1] : bounds[-1] + n], k, v, 0.3, window))
        bounds.append(bounds[-1] + n)
    out = ops.paged_attention(
        q, k_cache, v_cache, torch.tensor(tables), torch.tensor(context), torch.tensor(bounds), 0.3, window
    )
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 6),
    st.integers(0, 99),
)  # fmt: skip
def test_varlen_attention(new, kv_heads, group, window, seed):
    total, heads, dim = sum(new), kv_heads * group, 8
    packed = draw(seed, total, heads + 2 * kv_heads, dim)  # strided views, as the model makes them
    q, k, v = packed.split((heads, kv_heads, kv_heads), dim=1)
    bounds = torch.tensor([0, *new]).cumsum(0)
    out = ops.varlen_attention(q, k, v, bounds, 0.5, window)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        expected = naive(q[start:end], k[start:end], v[start:end], 0.5, window)
        torch.testing.assert_close(out[start:end].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_in_low_precision(dtype):
    """The grouped form of a single query keeps the tolerance rule against one head at a time."""
    q, k, v = draw(1, 1, 9, 64, dtype=dtype), draw(2, 50, 3, 64, dtype=dtype), draw(3, 50, 3, 64, dtype=dtype)
    truth = naive(q, k, v, 0.125, 0)
    heads = [
        torch.nn.functional.scaled_dot_product_attention(
            q[:, h : h + 1].transpose(0, 1), k[:, h // 3 : h // 3 + 1].transpose(0, 1),
            v[:, h // 3 : h // 3 + 1].transpose(0, 1), scale=0.125,
        ).transpose(0, 1)
        for h in range(9)
    ]  # fmt: skip
    assert_as_accurate(_attend(q, k, v, 0.125, 0), torch.cat(heads, dim=1), truth)


def test_rotary_equals_complex_multiplication():
    positions = torch.tensor([0, 5, 77, 255, 3])
    table = RotaryTable(RopeSpec(theta=500.0), 12, torch.device("cpu")).rows(256)
    packed = draw(4, 5, 7, 12)
    before = packed.clone()
    q, k, _ = packed.split((4, 2, 1), dim=1)
    ops.rotary(q, k, table, positions)
    frequencies = 500.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    turn = torch.polar(torch.ones(5, 6, dtype=torch.float64), positions[:, None] * frequencies)[:, None]
    old = torch.complex(before[..., :6].double(), before[..., 6:].double())
    new = torch.cat(((old * turn).real, (old * turn).imag), dim=-1)
    torch.testing.assert_close(packed[:, :6].double(), new[:, :6], atol=1e-4, rtol=1e-4)
    assert torch.equal(packed[:, 6:], before[:, 6:])  # values are not rotated


def test_rotary_table_grows_and_keeps_its_rows():
    table = RotaryTable(RopeSpec(), 8, torch.device("cpu"))
    first = table.rows(10).clone()
    assert torch.equal(table.rows(5000)[: len(first)], first)
    assert len(table.rows(5000)) >= 5000


def test_silu_mul_and_head_norm():
    gate_up = draw(5, 6, 14)
    expected = torch.nn.functional.silu(gate_up[:, :7].double()) * gate_up[:, 7:].double()
    torch.testing.assert_close(ops.silu_mul(gate_up).double(), expected)
    x, weight = draw(6, 5, 3, 8), draw(7, 3, 8)
    expected = torch.stack(
        [torch.nn.functional.rms_norm(x[:, h].double(), (8,), weight[h].double(), 1e-5) for h in range(3)], dim=1
    )
    ops.head_rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(x.double(), expected)
    with pytest.raises(ValueError, match=r"expected weight of shape \[3, 8\], got \[8, 3\]"):
        ops.head_rms_norm(x, weight.T, 1e-5)


def test_the_op_contract():
    """Schemas tell the truth about mutation, and shapes are known without values."""
    library = torch.ops.depthprune
    bounds = torch.tensor([0, 3])
    q, kv, cache = draw(1, 3, 4, 8), draw(2, 3, 2, 8), draw(3, 4, 2, 2, 8)
    table = RotaryTable(RopeSpec(), 8, torch.device("cpu")).rows(16)
    slots, tables = torch.tensor([0, 1, 2]), torch.tensor([[0, 1]])
    checks = ("test_schema", "test_faketensor")
    for op, args in [
        (library.varlen_attention, (q, kv, kv.clone(), bounds, 0.3, 0)),
        (library.paged_attention, (q, cache, cache.clone(), tables, torch.tensor([3]), bounds, 0.3, 0)),
        (library.kv_write, (kv, kv.clone(), cache, cache.clone(), slots)),
        (library.rotary, (q.clone(), kv.clone(), table, slots)),
        (library.silu_mul, (draw(4, 3, 8),)),
        (library.head_rms_norm, (q.clone(), draw(5, 4, 8), 1e-5)),
    ]:
        torch.library.opcheck(op.default, args, test_utils=checks)


def test_what_serves_each_device():
    assert ops.implementations("head_rms_norm") == {"CPU": "native", "CUDA": "reference"}
    assert ops.implementations("add_rms_norm")["CPU"] == "native"
