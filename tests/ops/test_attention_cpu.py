"""The CPU attention against plain torch and float64: paged and packed, any batch, group, head size and window."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from accuracy import assert_as_accurate
from built import built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.ops import implementations
from depthprune_runtime.ops._library import REFERENCES

_C = built()
LEVELS = _C.cpu_levels()
ATTENTION_LEVELS = LEVELS
at_every_level = pytest.mark.parametrize("level", ATTENTION_LEVELS)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
paged_attention = torch.ops.depthprune.paged_attention.default
varlen_attention = torch.ops.depthprune.varlen_attention.default


@contextlib.contextmanager
def at_level(name: str) -> Iterator[None]:
    _C.set_cpu_level(name)
    try:
        yield
    finally:
        _C.set_cpu_level(LEVELS[-1])


@dataclass
class Case:
    """requests: (queries, context) of each; q, k, v of each lie in `parts`, and packed in the tensors of the op."""

    parts: list[tuple[Tensor, Tensor, Tensor]]
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    contexts: Tensor
    bounds: Tensor
    scale: float
    window: int

    @property
    def args(self) -> tuple:
        return (
            self.q, self.k_cache, self.v_cache, self.tables, self.contexts, self.bounds, self.scale, self.window
        )  # fmt: skip

    def alone(self, i: int) -> Tensor:
        start, end = self.bounds[i], self.bounds[i + 1]
        return paged_attention(
            self.q[start:end], self.k_cache, self.v_cache, self.tables[i : i + 1], self.contexts[i : i + 1],
            torch.tensor([0, end - start]), self.scale, self.window,
        )  # fmt: skip

    def truth(self) -> Tensor:
        return torch.cat([dense(*part, self.scale, self.window) for part in self.parts])


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """The formula in float64: q [Tq, H, D] are the last positions of k, v [S, K, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k) * scale
    position = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))[None]
    hidden = (key > position) | ((key <= position - window) if window > 0 else False)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def build(
    requests: list[tuple[int, int]], heads: tuple[int, int, int], page: int, dtype: torch.dtype, window: int, seed: int
) -> Case:
    """Requests in permuted kv_blocks; every slot that no request uses is NaN."""
    num_heads, num_kv_heads, dim = heads
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator)
        x[..., dim // 3] *= 4  # an outlier channel
        return x.to(dtype)

    used = [-(-context // page) for _, context in requests]
    order = torch.randperm(sum(used) + 2, generator=generator)
    k_cache = torch.full((len(order), page, num_kv_heads, dim), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    tables = torch.full((len(requests), max(used, default=0) + 1), -1)
    parts, first = [], 0
    for i, (queries, context) in enumerate(requests):
        blocks = order[first : first + used[i]]
        first += used[i]
        tables[i, : used[i]] = blocks
        k, v = draw(context, num_kv_heads, dim), draw(context, num_kv_heads, dim)
        for cache, x in ((k_cache, k), (v_cache, v)):
            flat = torch.full((used[i] * page, num_kv_heads, dim), torch.nan, dtype=dtype)
            flat[:context] = x
            cache[blocks] = flat.unflatten(0, (-1, page))
        parts.append((draw(queries, num_heads, dim), k, v))
    bounds = torch.tensor([0, *(queries for queries, _ in requests)]).cumsum(0)
    q = torch.cat([part[0] for part in parts])
    contexts = torch.tensor([context for _, context in requests])
    return Case(parts, q, k_cache, v_cache, tables, contexts, bounds, dim**-0.5, window)


def reference(case: Case) -> Tensor:
    """Plain torch, one request at a time; its tables must not hold the unused -1."""
    tables = case.tables.clamp(min=0)
    return REFERENCES["paged_attention"](*case.args[:3], tables, *case.args[4:])


def baseline(case: Case, truth: Tensor) -> Tensor:
    """Plain torch, the worse of two orders of summation at each element.

    With an outlier channel, half a rounding step of one score moves an output further than the rule allows for, and
    either order may be lucky: at the seed of the next test torch errs by 2.6e-6 one way and by 9.1e-6 the other.
    """
    order = torch.arange(case.q.shape[-1]).flip(0)
    turned = dataclasses.replace(case, q=case.q[..., order], k_cache=case.k_cache[..., order])
    one, other = reference(case), reference(turned)
    return torch.where((one.double() - truth).abs() >= (other.double() - truth).abs(), one, other)


def check(case: Case) -> None:
    truth = case.truth().double()
    assert_as_accurate(paged_attention(*case.args), baseline(case, truth), truth)


def test_a_seed_at_which_one_order_of_summation_is_lucky() -> None:
    check(build([(2, 65), (2, 532), (1, 531)], (9, 3, 64), 1, torch.float32, 0, 2048))


@at_every_level
def test_queries_are_not_rounded_by_the_scale(level) -> None:
    """At this seed scaled queries erred 2.7 times as much as plain torch at the generic level."""
    with at_level(level):
        check(build([(17, 273), (1, 65)], (18, 6, 32), 16, torch.float32, 0, 397))


def test_the_extension_serves_the_cpu() -> None:
    assert implementations("paged_attention")["CPU"] == "native"
    assert implementations("varlen_attention")["CPU"] == "native"


request = st.tuples(st.sampled_from([1, 1, 1, 2, 5, 17, 70]), st.sampled_from([0, 1, 7, 63, 64, 190, 256, 530]))
HEADS = [(9, 3, 64), (1, 1, 16), (4, 4, 80), (6, 1, 72), (18, 6, 32), (14, 2, 64), (5, 1, 8), (3, 3, 17), (8, 4, 256)]


@at_every_level
@settings(max_examples=35, deadline=None)
@given(
    st.lists(request, min_size=1, max_size=4), st.sampled_from(HEADS), st.sampled_from([1, 8, 16, 64]),
    st.sampled_from(DTYPES), st.sampled_from([0, 0, 1, 5, 64, 300]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_batch(level, requests, heads, page, dtype, window, seed):
    with at_level(level):
        check(build([(new, new + old) for new, old in requests], heads, page, dtype, window, seed))


@at_every_level
@pytest.mark.parametrize("heads", [(64, 16, 128), (64, 1, 32), (200, 1, 16)])
def test_wide_attention(level, heads):
    """Merged heads, and more heads to a KV head than a tile has rows."""
    with at_level(level):
        check(build([(1, 300), (3, 40)], heads, 16, torch.bfloat16, 0, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 2, 72)])
def test_a_request_does_not_see_its_batch_or_the_threads(heads, dtype):
    case = build([(1, 600), (70, 400), (1, 3), (4, 260), (1, 257), (130, 130)], heads, 16, dtype, 0, 1)
    together = paged_attention(*case.args)
    for i in range(len(case.parts)):
        assert torch.equal(case.alone(i), together[case.bounds[i] : case.bounds[i + 1]])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            assert torch.equal(paged_attention(*case.args), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_nan_stays_in_its_request(what):
    case = build([(1, 300), (20, 90), (1, 70)], (6, 2, 64), 16, torch.bfloat16, 0, 2)
    clean = paged_attention(*case.args)
    if what == "q":
        case.q[case.bounds[1] + 3] = torch.nan
    else:
        cache = case.k_cache if what == "k" else case.v_cache
        cache[case.tables[1, 4], 5] = torch.nan  # position 69: queries 0 .. 19 are positions 70 .. 89
    out = paged_attention(*case.args)
    start, end = case.bounds[1], case.bounds[2]
    assert torch.equal(out[:start], clean[:start])
    assert torch.equal(out[end:], clean[end:])
    hit = out[start:end].isnan().flatten(1).all(1)
    assert hit.sum() == (1 if what == "q" else end - start)


def test_a_window_reads_no_older_kv_block():
    case = build([(1, 300), (3, 500)], (4, 2, 32), 16, torch.float32, 40, 3)
    expected = paged_attention(*case.args)
    case.tables[0, : (300 - 40) // 16] = -1
    case.tables[1, : (498 - 40) // 16] = 10**9
    assert torch.equal(paged_attention(*case.args), expected)


@at_every_level
def test_large_scores_and_masked_tiles(level):
    """Scores of both signs whose exponentials overflow and underflow float32."""
    case = build([(1, 200), (80, 200)], (2, 1, 16), 16, torch.float32, 0, 4)
    case.scale = 60.0
    with at_level(level):
        check(case)


def test_empty_batches():
    empty = torch.empty(0, 4, 16)
    cache = torch.empty(2, 8, 2, 16)
    none = torch.zeros(0, dtype=torch.int64)
    out = paged_attention(empty, cache, cache, torch.zeros(0, 3, dtype=torch.int64), none, torch.tensor([0]), 1.0, 0)
    assert out.shape == (0, 4, 16)
    assert varlen_attention(empty, empty, empty, torch.tensor([0, 0]), 1.0, 0).shape == (0, 4, 16)
    case = build([(1, 9), (0, 5), (2, 2)], (4, 2, 16), 8, torch.float32, 0, 5)
    assert_as_accurate(paged_attention(*case.args), case.truth().float(), case.truth())


@at_every_level
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 5, 63, 64, 65, 200, 300]), min_size=1, max_size=3), st.sampled_from(HEADS),
    st.sampled_from(DTYPES), st.sampled_from([0, 0, 1, 7, 64, 150]), st.integers(0, 2**31),
)  # fmt: skip
def test_varlen_attention(level, lengths, heads, dtype, window, seed):
    """q, k and v are views of one packed projection whose other columns are NaN."""
    with at_level(level):
        check_packed(lengths, heads, dtype, window, seed)


def check_packed(lengths, heads, dtype, window, seed):
    num_heads, num_kv_heads, dim = heads
    total = num_heads + 2 * num_kv_heads
    packed = torch.full((sum(lengths), total + 1, dim), torch.nan, dtype=dtype)
    packed[:, :total] = torch.randn(sum(lengths), total, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q, k, v, _ = packed.split((num_heads, num_kv_heads, num_kv_heads, 1), dim=1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    args = (q, k, v, bounds, dim**-0.5, window)
    spans = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    truth = torch.cat([dense(q[a:b], k[a:b], v[a:b], dim**-0.5, window) for a, b in spans])
    out = varlen_attention(*args)
    assert_as_accurate(out, REFERENCES["varlen_attention"](*args), truth)
    last = slice(*spans[-1])
    assert torch.equal(
        varlen_attention(q[last], k[last], v[last], torch.tensor([0, lengths[-1]]), dim**-0.5, window), out[last]
    )


def test_int32_indices_and_strided_tensors():
    case = build([(1, 30), (7, 50)], (4, 2, 24), 8, torch.bfloat16, 0, 6)
    expected = paged_attention(*case.args)
    q, k_cache, v_cache, tables, contexts, bounds, scale, window = case.args
    wide = torch.stack([k_cache, v_cache], dim=2)  # [N, P, 2, K, D]
    out = paged_attention(
        q.transpose(1, 2).contiguous().transpose(1, 2), wide[:, :, 0], wide[:, :, 1],
        tables.int(), contexts.int(), bounds.int(), scale, window,
    )  # fmt: skip
    assert torch.equal(out, expected)


ERRORS = {
    "dtype of q": (0, lambda x: x.double(), r"q of dtype bfloat16, float16 or float32, got Double"),
    "dtype of the cache": (1, lambda x: x.half(), r"keys and values of dtype Float \(that of q\), got Half"),
    "heads": (0, lambda x: x[:, :3], r"k_cache of shape \[\.\.\., K, 8\] where K divides the 3 heads of q"),
    "values": (2, lambda x: x[:1], r"values of shape .* \(that of keys\)"),
    "cache dimensions": (1, lambda x: x[0], r"k_cache of shape \[N, P, K, D\]"),
    "free kv_block": (3, lambda x: x.masked_fill(x == x[0, 0], -1), r"block_tables of kv_blocks from 0 to 4, got -1"),
    "large kv_block": (3, lambda x: x + 5, r"block_tables of kv_blocks from 0 to 4, got \d+ at \[0, 0\]"),
    "table type": (3, lambda x: x.float(), r"block_tables of dtype int64 or int32, got Float"),
    "short context": (4, lambda x: x * 0, r"context_lens of values from 1 \(queries\) to 12 \(room\), got 0"),
    "long context": (4, lambda x: x + 99, r"context_lens of values from 1 .* got 104 for request 0"),
    "lengths": (4, lambda x: x[:1], r"context_lens of shape \[2\], got \[1\]"),
    "bounds start": (5, lambda x: x + 1, r"cu_seqlens_q of first value 0, got 1"),
    "bounds fall": (
        5,
        lambda x: x * torch.tensor([1, 9, 1]),
        r"cu_seqlens_q of values that do not fall, got 3",
    ),
    "bounds end": (5, lambda x: x.clamp(max=2), r"cu_seqlens_q of last value 3 \(the tokens of q\), got 2"),
}


@pytest.mark.parametrize(("position", "change", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_argument(position, change, message):
    args = list(build([(1, 5), (2, 4)], (4, 2, 8), 4, torch.float32, 0, 7).args)
    args[position] = change(args[position])
    with pytest.raises(ValueError, match=f"paged_attention: expected {message}"):
        paged_attention(*args)


def test_attention_without_heads_is_refused() -> None:
    q, kv, bounds = torch.empty(3, 0, 8), torch.ones(3, 2, 8), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"varlen_attention: expected q of shape .* H and D of at least 1"):
        ops.varlen_attention(q, kv, kv, bounds, 1.0)
    cache, table = torch.ones(1, 4, 2, 8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"paged_attention: expected q of shape .* H and D of at least 1"):
        ops.paged_attention(q, cache, cache, table, torch.tensor([3]), bounds, 1.0)
    with pytest.raises(ValueError, match="varlen_attention: expected window of at least 0"):
        ops.varlen_attention(torch.ones(3, 2, 8), kv, kv, bounds, 1.0, -5)
