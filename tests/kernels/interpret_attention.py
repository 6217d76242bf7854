"""The Triton attention kernels on CPU tensors; run by test_interpret.py with TRITON_INTERPRET=1.

float32 and float16 only: the interpreter sums and compares the bit patterns of bfloat16. Its tiles are 16 x 16, so
that a few tokens fill several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from accuracy import assert_as_accurate
from interpreter import allow_loop_bounds
from torch import Tensor

from depthprune_runtime.kernels import attention, attention_decode
from depthprune_runtime.kernels.launch_attention import decode_config
from depthprune_runtime.ops._library import REFERENCES

allow_loop_bounds()
HALF, FULL = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int, outlier: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if outlier:
        x[..., shape[-1] // 3] *= 1000
    return x


def packed(new: Sequence[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and bounds; q, k, v are slices of a projection with NaN heads on both sides of each."""
    total = sum(new)
    parts = [draw(total, heads, dim, seed=1, outlier=False), draw(total, kv_heads, dim, seed=2)]
    parts.append(draw(total, kv_heads, dim, seed=3))
    gap = torch.full((total, 1, dim), torch.nan)
    wide = torch.cat([gap, *itertools.chain(*((part, gap) for part in parts))], dim=1).to(dtype)
    _, q, _, k, _, v, _ = wide.split((1, heads, 1, kv_heads, 1, kv_heads, 1), dim=1)
    return q, k, v, torch.tensor([0, *itertools.accumulate(new)])


@dataclass(frozen=True)
class Paged:
    q: Tensor  # [T, H, D]
    k_cache: Tensor  # [N, P, K, D]
    v_cache: Tensor  # [N, P, K, D]
    tables: Tensor  # [B, M]
    lengths: Tensor  # [B]
    bounds: Tensor  # [B + 1]

    def run(self, window: int = 0) -> Tensor:
        return attention.paged_attention(*vars(self).values(), 0.125, window)

    def reference(self, window: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        tensors = [t if dtype is None else t.to(dtype) for t in (self.q, self.k_cache, self.v_cache)]
        return REFERENCES["paged_attention"](*tensors, self.tables, self.lengths, self.bounds, 0.125, window)

    def check(self, window: int = 0) -> None:
        out = self.run(window)
        assert_as_accurate(out, self.reference(window), self.reference(window, torch.float64))
        assert torch.equal(out, self.run(window)), "two runs differ"


def paged(
    new: Sequence[int], lengths: Sequence[int], heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype
) -> Paged:
    """Pages in random order; NaN in all that no request uses, and surplus table entries far out of range."""
    counts = [math.ceil(n / page) for n in lengths]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(4)).tolist()
    k_cache = torch.full((len(order), page, kv_heads, dim), torch.nan)
    v_cache = k_cache.clone()
    tables = torch.full((len(lengths), max(counts) + 1), 1 << 40)
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        blocks = torch.tensor([order.pop() for _ in range(count)])
        tables[i, :count] = blocks
        slots = torch.arange(length)
        k_cache[blocks[slots // page], slots % page] = draw(length, kv_heads, dim, seed=10 + i)
        v_cache[blocks[slots // page], slots % page] = draw(length, kv_heads, dim, seed=20 + i)
    bounds = torch.tensor([0, *itertools.accumulate(new)])
    q = packed(new, heads, 1, dim, dtype)[0]
    return Paged(q, k_cache.to(dtype), v_cache.to(dtype), tables, torch.tensor(lengths), bounds)


@pytest.mark.parametrize(
    ("new", "heads", "kv_heads", "dim", "window", "dtype"),
    [
        ([1, 37, 2, 17], 3, 3, 8, 0, FULL),
        ([5, 16, 40], 3, 1, 24, 0, HALF),
        ([33, 20], 8, 2, 16, 9, FULL),
        ([70, 3], 3, 1, 16, 40, HALF),
        ([20, 1, 9], 18, 6, 8, 0, HALF),
        ([17, 3], 18, 18, 8, 5, FULL),
        ([40], 2, 1, 80, 1, HALF),
    ],
)
def test_varlen(new: list[int], heads: int, kv_heads: int, dim: int, window: int, dtype: torch.dtype) -> None:
    q, k, v, bounds = packed(new, heads, kv_heads, dim, dtype)
    out = attention.varlen_attention(q, k, v, bounds, 0.125, window)
    reference = REFERENCES["varlen_attention"]
    truth = reference(q.double(), k.double(), v.double(), bounds, 0.125, window)
    assert_as_accurate(out, reference(q, k, v, bounds, 0.125, window), truth)
    assert torch.equal(out, attention.varlen_attention(q, k, v, bounds, 0.125, window)), "two runs differ"


@pytest.mark.parametrize(
    ("new", "lengths", "heads", "kv_heads", "dim", "page", "window", "dtype"),
    [
        ([3, 20, 1], [50, 20, 30], 3, 1, 8, 16, 0, FULL),
        ([30, 2], [61, 70], 4, 4, 16, 5, 0, HALF),
        ([2, 35, 1], [70, 36, 1], 8, 2, 24, 1, 21, FULL),
        ([9, 1], [40, 70], 9, 3, 8, 16, 7, HALF),
    ],
)
def test_chunked_prefill(
    new: list[int], lengths: list[int], heads: int, kv_heads: int, dim: int, page: int, window: int, dtype: torch.dtype
) -> None:
    paged(new, lengths, heads, kv_heads, dim, page, dtype).check(window)


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "page", "window", "dtype"),
    [
        ([1, 70, 33], 3, 3, 8, 16, 0, FULL),
        ([70], 3, 1, 24, 16, 0, HALF),
        ([70, 16], 4, 1, 16, 5, 0, FULL),
        ([17, 48], 9, 3, 80, 16, 0, HALF),
        ([45], 18, 18, 16, 1, 0, HALF),
        ([70, 5], 4, 4, 16, 16, 20, FULL),
        ([70, 5], 9, 3, 16, 16, 33, HALF),
        ([50], 20, 1, 8, 7, 1, FULL),
    ],
)
def test_decode(
    lengths: list[int], heads: int, kv_heads: int, dim: int, page: int, window: int, dtype: torch.dtype
) -> None:
    paged([1] * len(lengths), lengths, heads, kv_heads, dim, page, dtype).check(window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
def test_splits(heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of splits, also more than tiles, and the tickets are zeros afterwards."""
    case = paged([1, 1], [70, 18], heads, kv_heads, 16, 16, FULL)
    base = decode_config(2, heads, kv_heads, 16, 96, 4, (0, 0))
    for splits, min_tiles in [(2, 1), (3, 2), (9, 1)]:
        config = replace(base, splits=splits, min_tiles=min_tiles)
        monkeypatch.setattr(attention_decode, "decode_config", lambda *_, config=config: config)
        case.check(window=30 if splits == 3 else 0)
        assert not attention_decode._tickets(case.q.device).any()


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_without_context(heads: int) -> None:
    """Padding rows of a bucket: zeros, whatever their query and block table hold."""
    case = paged([1] * 4, [20, 1, 1, 40], heads, 1, 8, 16, FULL)
    q = case.q.clone()
    q[1:3] = torch.nan
    padded = replace(case, q=q, lengths=torch.tensor([20, 0, -1, 40]), tables=case.tables.clone())
    padded.tables[1:3] = 1 << 40
    out = padded.run()
    assert torch.equal(out[1:3], torch.zeros(2, heads, 8))
    assert torch.equal(out[[0, 3]], case.run()[[0, 3]])


def test_a_request_does_not_feel_its_neighbours() -> None:
    """Bit for bit: prefill whatever the batch, decode at the same number of splits."""
    q, k, v, bounds = packed([21, 18, 5], 3, 1, 8, HALF)
    together = attention.varlen_attention(q, k, v, bounds, 0.125, 0)
    for start, end in itertools.pairwise(bounds.tolist()):
        alone = attention.varlen_attention(
            q[start:end], k[start:end], v[start:end], torch.tensor([0, end - start]), 0.125, 0
        )
        assert torch.equal(alone, together[start:end])
    case = paged([1, 1, 1], [70, 30, 50], 3, 1, 8, 16, HALF)
    out = case.run()
    changed = replace(case, lengths=torch.tensor([70, 9, 3])).run()
    assert torch.equal(out[0], changed[0])
    assert not torch.equal(out[1], changed[1])


def test_more_sequences_than_one_search_step() -> None:
    new = [1 + i % 3 for i in range(130)]
    q, k, v, bounds = packed(new, 1, 1, 8, FULL)
    out = attention.varlen_attention(q, k, v, bounds, 0.125, 0)
    truth = REFERENCES["varlen_attention"](q.double(), k.double(), v.double(), bounds, 0.125, 0)
    torch.testing.assert_close(out.double(), truth, atol=1e-3, rtol=1e-5)


def test_strides_of_other_layouts() -> None:
    """Head-major queries, and a cache whose last dimension is not contiguous."""
    case = paged([3, 2], [20, 9], 4, 2, 8, 4, FULL)
    across = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    turned = replace(case, q=across, k_cache=case.k_cache.transpose(1, 3).contiguous().transpose(1, 3))
    assert torch.equal(turned.run(), case.run())
    assert turned.run().stride() == torch.empty_like(across).stride()


def test_a_negative_window_is_none() -> None:
    case = paged([3, 1], [20, 9], 2, 1, 8, 4, FULL)
    assert torch.equal(case.run(window=-1), case.run())


def test_a_capture_needs_its_tickets_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="expected one decode on cuda:7 before a CUDA graph is captured"):
        attention_decode._tickets(torch.device("cuda:7"))


def test_no_tokens() -> None:
    q, kv = torch.empty(0, 3, 8), torch.empty(0, 1, 8)
    assert attention.varlen_attention(q, kv, kv, torch.tensor([0]), 0.125, 0).shape == (0, 3, 8)


def test_errors_name_the_argument() -> None:
    q, k, v, bounds = packed([4], 3, 1, 8, FULL)
    with pytest.raises(ValueError, match=r"varlen_attention: expected q of dtype .*, got torch.float64"):
        attention.varlen_attention(q.double(), k, v, bounds, 0.125, 0)
    with pytest.raises(ValueError, match=r"expected v of shape \[4, 1, 8\], got \[3, 1, 8\]"):
        attention.varlen_attention(q, k, v[:3], bounds, 0.125, 0)
    with pytest.raises(ValueError, match=r"expected scale > 0, got 0.0"):
        attention.varlen_attention(q, k, v, bounds, 0.0, 0)
    with pytest.raises(ValueError, match=r"expected cu_seqlens of int64, 1 dimension\(s\), .* got torch.float32"):
        attention.varlen_attention(q, k, v, bounds.float(), 0.125, 0)
    with pytest.raises(ValueError, match=r"expected num_heads a multiple of num_kv_heads, got 3, 2"):
        attention.varlen_attention(q, k.expand(4, 2, 8), v.expand(4, 2, 8), bounds, 0.125, 0)
    case = paged([1, 1], [3, 4], 3, 1, 8, 4, FULL)
    with pytest.raises(ValueError, match=r"expected block_tables of 2 requests like context_lens, got 1"):
        replace(case, tables=case.tables[:1]).run()
