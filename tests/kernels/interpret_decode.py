"""The decode projections and the end of a step on CPU tensors; run by test_interpret.py with TRITON_INTERPRET=1.

float32 and float16 only: the interpreter truncates where it rounds to bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor

from depthprune_runtime.kernels import draw_tokens, linear_add, next_tokens, norm_linear, norm_qkv, rotary_kv_write
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.ops._library import REFERENCES
from depthprune_runtime.spec import RopeSpec
from depthprune_runtime.weights.packed import pack
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

EPS = 1e-5
DTYPES = [torch.float16, torch.float32]
KINDS = ["dense", "8 bits, 32", "4 bits, 64", "4 bits, 32, zeros"]
Packed = tuple[list[Tensor], list[int]]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(tokens: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x with one outlier channel inside a wider tensor of NaN: a read beyond a row shows; and a gain."""
    x = draw(0, tokens, size)
    x[:, size // 3] *= 1000
    wide = torch.full((tokens, size + 3), torch.nan, dtype=dtype)
    wide[:, :size] = x.to(dtype)
    return wide[:, :size], (1 + 0.2 * draw(1, size)).to(dtype)


def packed(kind: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[Packed, Tensor]:
    """A weight of `kind`, and what it stands for in float64."""
    if kind == "dense":
        dense = draw(2, rows, columns).mul_(columns**-0.5).to(dtype)
        return pack(dense), dense.double()
    spec = QuantSpec(int(kind[0]), 32 if "32" in kind else 64, "zeros" not in kind)
    generator = torch.Generator().manual_seed(3)
    groups = -(-columns // spec.group_size)
    codes = torch.randint(0, spec.levels, (rows, columns), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) / spec.levels).bfloat16()
    zeros = None if spec.symmetric else torch.randint(0, spec.levels, (rows, groups), generator=generator)
    weight = QuantizedWeight.from_codes(spec, codes, scales, zeros)
    return pack(weight), weight.dense().double()


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x.double(), gain.shape, gain.double(), EPS)


def plain(dense: Tensor, dtype: torch.dtype) -> Packed:
    """The same weight for the baseline: dense, or the CPU's integer kernels would stand in for plain torch."""
    return pack(dense.to(dtype))


def check(op: str, launcher, x: Tensor, gain: Tensor, weight: Packed, dense: Tensor, bias, truth: Tensor) -> None:
    out = launcher(x, gain, EPS, *weight, bias)
    assert_as_accurate(out, REFERENCES[op](x, gain, EPS, *plain(dense, x.dtype), bias), truth, op)
    assert torch.equal(out, launcher(x, gain, EPS, *weight, bias)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 40, 72), (3, 17, 130), (18, 33, 72)])
def test_norm_linear(kind: str, tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, gain = inputs(tokens, columns, dtype)
    weight, dense = packed(kind, rows, columns, dtype)
    bias = draw(4, rows, dtype=dtype) if rows % 2 else None
    truth = normed(x, gain) @ dense.T + (0.0 if bias is None else bias.double())
    check("norm_linear", norm_linear.norm_linear, x, gain, weight, dense, bias, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "channels", "columns"), [(2, 20, 72), (7, 16, 64)])
def test_norm_gated_linear(kind: str, tokens: int, channels: int, columns: int, dtype: torch.dtype) -> None:
    x, gain = inputs(tokens, columns, dtype)
    weight, dense = packed(kind, 2 * channels, columns, dtype)
    bias = draw(4, 2 * channels, dtype=dtype)
    gate, up = (normed(x, gain) @ dense.T + bias.double()).chunk(2, dim=1)
    truth = torch.nn.functional.silu(gate) * up
    check("norm_gated_linear", norm_linear.norm_gated_linear, x, gain, weight, dense, bias, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(4, 17, 136), (6, 16, 40)])
def test_linear_add(kind: str, tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, _ = inputs(tokens, columns, dtype)
    x = x / 30  # the outlier channel would leave float16
    (weight, layout), dense = packed(kind, rows, columns, dtype)
    residual, bias = draw(5, tokens, rows, dtype=dtype), draw(4, rows, dtype=dtype)
    truth = residual.double() + x.double() @ dense.T + bias.double()
    runs = []
    for _ in range(2):
        runs.append(residual.clone())
        linear_add.linear_add(x, runs[-1], weight, layout, bias)
    assert torch.equal(*runs)
    baseline = residual.clone()
    REFERENCES["linear_add"](x, baseline, *plain(dense, dtype), bias)
    assert_as_accurate(runs[0], baseline, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "page"), [(3, 3, 1, 24, 4), (1, 4, 4, 8, 1), (5, 6, 2, 16, 16)]
)
def test_norm_qkv(kind: str, tokens: int, heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype) -> None:
    columns = 72
    x, gain = inputs(tokens, columns, dtype)
    rows = (heads + 2 * kv_heads) * dim
    weight, dense = packed(kind, rows, columns, dtype)
    bias = draw(4, rows, dtype=dtype)
    table = RotaryTable(RopeSpec(), dim, torch.device("cpu")).rows(300)
    generator = torch.Generator().manual_seed(6)
    positions = torch.randint(0, 300, (tokens,), generator=generator)
    slots = torch.randperm(2 * tokens * page, generator=generator)[:tokens]
    if tokens > 1:
        slots[-1] = -1

    def run(function, weight: Packed) -> list[Tensor]:
        caches = [torch.full((2 * tokens, page, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2)]
        q = function(x, gain, EPS, *weight, bias, table, positions, slots, *caches)
        kept = [cache.flatten(0, 1)[slots[slots >= 0]] for cache in caches]
        assert all(int(c.isnan().sum()) == c.numel() - k.numel() for c, k in zip(caches, kept, strict=True))
        return [q, *kept]

    first, again = run(norm_qkv.norm_qkv, weight), run(norm_qkv.norm_qkv, weight)
    baseline = run(REFERENCES["norm_qkv"], plain(dense, dtype))
    exact = (normed(x, gain) @ dense.T + bias.double()).view(tokens, -1, dim)
    REFERENCES["rotary"](exact[:, :heads], exact[:, heads : heads + kv_heads], table.double(), positions)
    q, k, v = exact.split((heads, kv_heads, kv_heads), dim=1)
    truth = [q, k[slots >= 0], v[slots >= 0]]
    for name, a, b, c, d in zip("qkv", first, again, baseline, truth, strict=True):
        assert torch.equal(a, b), f"{name}: two runs differ"
        assert_as_accurate(a, c, d, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed_heads", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page"), [(3, 1, 24, 4), (6, 2, 16, 1)])
def test_rotary_kv_write(
    heads: int, kv_heads: int, dim: int, page: int, normed_heads: bool, dtype: torch.dtype
) -> None:
    tokens = 5
    packed_heads = draw(0, tokens, heads + 2 * kv_heads, dim)
    packed_heads[:, :, dim // 3] *= 100
    table = RotaryTable(RopeSpec(), dim, torch.device("cpu")).rows(300)
    positions = torch.randint(0, 300, (tokens,), generator=torch.Generator().manual_seed(1))
    slots = torch.tensor([3, 0, -1, 7, 5])
    gains = [1 + 0.2 * draw(2, n, dim) for n in (heads, kv_heads)] if normed_heads else [None, None]

    def run(function, kind: torch.dtype) -> list[Tensor]:
        parts = packed_heads.to(dtype).to(kind).clone()
        q, k, v = parts.split((heads, kv_heads, kv_heads), dim=1)
        caches = [torch.full((8 // page + 1, page, kv_heads, dim), torch.nan, dtype=kind) for _ in range(2)]
        of_kind = [None if g is None else g.to(dtype).to(kind) for g in gains]
        function(q, k, v, *of_kind, EPS, table.to(torch.float32), positions, *caches, slots)
        return [parts, *(c.flatten(0, 1)[slots[slots >= 0]] for c in caches)]

    first, again = run(rotary_kv_write.rotary_kv_write, dtype), run(rotary_kv_write.rotary_kv_write, dtype)
    baseline, truth = run(REFERENCES["rotary_kv_write"], dtype), run(REFERENCES["rotary_kv_write"], torch.float32)
    for name, a, b, c, d in zip(("packed", "keys", "values"), first, again, baseline, truth, strict=True):
        assert torch.equal(a, b), f"{name}: two runs differ"
        assert_as_accurate(a, c, d, name)


@pytest.mark.parametrize("kind", ["dense", "4 bits, 32, zeros"])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 40), (2, 33), (6, 100)])
def test_norm_logits(kind: str, tokens: int, rows: int) -> None:
    x, gain = inputs(tokens, 72, torch.float32)
    (weight, layout), dense = packed(kind, rows, 72, torch.float32)
    logits, best, tokens_of_best = norm_linear.norm_logits(x, gain, EPS, weight, layout)
    baseline = REFERENCES["norm_logits"](x, gain, EPS, weight, layout)
    assert_as_accurate(logits, baseline[0], normed(x, gain) @ dense.T)
    assert best.shape == baseline[1].shape
    chosen = tokens_of_best.gather(1, best.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(chosen.long(), logits.argmax(1))
    assert torch.equal(best, logits.gather(1, tokens_of_best.long()))


def test_norm_logits_of_damaged_rows_and_equal_logits() -> None:
    x, gain = torch.ones(3, 32), torch.ones(32)
    x[1, 5] = torch.nan
    weight = torch.zeros(40, 32)
    _, best, tokens = norm_linear.norm_logits(x, gain, EPS, *pack(weight))
    assert best[1].tolist() == [torch.inf] * 3
    assert best[0].tolist() == [0.0] * 3
    assert tokens[0].tolist() == [0, 16, 32]


def state(batch: int, runs: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    best = torch.randint(-3, 4, (batch, runs), generator=generator).float()  # many equals
    best[1] = -torch.inf
    best[2, runs // 2] = torch.inf
    positions = torch.tensor([3, 4, 5, 7, 8, 0, 2])[:batch]
    return {
        "best": best,
        "candidates": torch.arange(batch * runs, dtype=torch.int32).view(batch, runs),
        "stop_ids": torch.tensor([[0, -1], [5, -1], [6, -1], [7, -1], [-1, -1], [2, 3], [1, 1]])[:batch],
        "block_tables": torch.randint(0, 50, (batch, 3), generator=generator),
        "ids": torch.arange(batch),
        "positions": positions,
        "slots": torch.where(torch.arange(batch) == 5, -1, torch.arange(batch)),
        "context_lens": positions + 1,
        "counts": torch.tensor([0, 0, 1, 1, 2, 0, 3])[:batch],
        "tokens": torch.full((3, batch), -7),
    }


@pytest.mark.parametrize("runs", [1, 5, 40])
def test_next_tokens(runs: int) -> None:
    results = []
    drawn = None if runs == 1 else torch.tensor([-1, 9, 9, 6, -1, 2, 2])
    for function in (next_tokens.next_tokens, REFERENCES["next_tokens"]):
        s = state(7, runs, seed=runs)
        stop = s["candidates"][0, s["best"][0].argmax()]
        s["stop_ids"][0, 1] = stop
        inputs_ = [s["best"], s["candidates"], drawn, s["stop_ids"], s["block_tables"]]
        function(*inputs_, 4, *(s[k] for k in ("ids", "positions", "slots", "context_lens", "counts", "tokens")))
        results.append(s)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert results[0]["slots"][0] == -1, "a stop token ends the row"


@pytest.mark.parametrize("size", [1, 40, 3000])
def test_draw_tokens(size: int) -> None:
    logits = 3 * draw(size, 6, size)
    temperatures = torch.tensor([1.0, 0.0, 0.3, 2.0, 1.0, 1.0])
    uniform = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniform[:, 4], uniform[:, 5] = 0.0, 1 - 2**-48
    counts = torch.tensor([0, 1, 2, 3, 4, 9])
    out = draw_tokens.draw_tokens(logits, temperatures, uniform, counts)
    assert torch.equal(out, REFERENCES["draw_tokens"](logits, temperatures, uniform, counts))
    assert out[1] == -1
    assert out[4] == 0


def test_errors_name_the_argument() -> None:
    x, gain, weight = torch.ones(2, 8), torch.ones(8), torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"norm_linear: expected weight of shape \[4, 8\]"):
        norm_linear.norm_linear(x, gain, EPS, *pack(torch.ones(4, 7)), None)
    with pytest.raises(ValueError, match=r"norm_linear: expected norm of shape \[8\]"):
        norm_linear.norm_linear(x, torch.ones(7), EPS, *pack(weight), None)
    with pytest.raises(ValueError, match=r"norm_gated_linear: expected a weight of an even number of rows, got 5"):
        norm_linear.norm_gated_linear(x, gain, EPS, *pack(torch.ones(5, 8)), None)
    with pytest.raises(ValueError, match=r"linear_add: expected residual of shape \[2, 4\]"):
        linear_add.linear_add(x, torch.ones(2, 5), *pack(weight), None)
    cache = torch.ones(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"norm_qkv: expected a weight of \(H \+ 2 \* 1\) \* 8 rows"):
        norm_qkv.norm_qkv(
            x, gain, EPS, *pack(torch.ones(12, 8)), None, torch.ones(4, 2, 4), torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64), cache, cache.clone(),
        )  # fmt: skip
