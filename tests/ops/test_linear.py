"""The CPU kernels of linear against plain torch, at every instruction level that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_as_accurate
from built import built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthprune_runtime.ops import implementations
from depthprune_runtime.ops._library import REFERENCES

_C = built()

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LEVELS = _C.cpu_levels()
# Levels with a product of their own for many tokens.
MANY = {
    torch.bfloat16: ("avx2", "avx512", "avx512_bf16", "amx"),
    torch.float16: ("avx2", "avx512", "avx512_bf16"),
    torch.float32: (),
}
# (T, N, K): the shapes of SmolLM2-135M, then rests of every block of tokens, rows and steps.
SHAPES = [
    (1, 960, 576),
    (2, 576, 1536),
    (7, 4, 32),
    (6, 5, 33),
    (1, 1, 1),
    (3, 2, 7),
    (5, 3, 31),
    (4, 130, 257),
    (4, 7, 96),
    (64, 9, 100),
    (1, 6, 16384),
    (65, 49, 33),
    (66, 96, 64),
    (131, 100, 577),
]
linear = torch.ops.depthprune.linear.default


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_cpu_level(request.param)
    assert _C.cpu_level() == request.param
    yield request.param
    _C.set_cpu_level(LEVELS[-1])


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def true_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def assert_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    # dense, for torch's own product may read what lies beside a row
    baseline = REFERENCES["linear"](x.contiguous(), weight.contiguous(), bias)
    assert_as_accurate(linear(x, weight, bias), baseline, true_linear(x, weight, bias), "linear")


def test_extension_serves_the_cpu() -> None:
    assert implementations("linear")["CPU"] == "native"
    assert LEVELS[0] == "generic"
    assert _C.cpu_level() == LEVELS[-1], "the highest level is the default"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype, level: str) -> None:
    tokens, rows, size = shape
    x, weight = draw(tokens, size, dtype=dtype), draw(rows, size, dtype=dtype, seed=1)
    assert_linear(x, weight)
    assert_linear(x, weight, draw(rows, dtype=dtype, seed=2) * 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 577])
def test_a_token_depends_on_nothing_but_itself(size: int, dtype: torch.dtype, level: str) -> None:
    """Bit-equal alone, in batches up to the largest that has kernels, on one thread and two, for any band of rows."""
    most = 4 if level == "generic" else 64
    x, weight = draw(most, size, dtype=dtype), draw(1027, size, dtype=dtype, seed=1)
    bias = draw(1027, dtype=dtype, seed=2)
    whole = linear(x, weight, bias)
    for tokens in range(1, min(14, most)):
        assert torch.equal(linear(x[:tokens], weight, bias), whole[:tokens])
    assert torch.equal(linear(x[most - 1 :], weight, bias), whole[most - 1 :])
    assert torch.equal(linear(x[:3], weight[5:], bias[5:]), whole[:3, 5:])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(x, weight, bias), whole)
        assert torch.equal(linear(x[:1], weight, bias), whole[:1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_formats_round_once(dtype: torch.dtype, level: str) -> None:
    """Sums of small integers are exact in float32, whatever the order: any second rounding shows."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-8, 9, (5, 300), generator=generator)
    weight = torch.randint(-8, 9, (11, 300), generator=generator)
    bias = torch.randint(-999, 1000, (11,), generator=generator)
    out = linear(x.to(dtype), weight.to(dtype), (bias // 8 * 8).to(dtype))
    assert torch.equal(out, (x @ weight.T + bias // 8 * 8).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_value(dtype: torch.dtype, level: str) -> None:
    """Each bit pattern times one: all finite values, infinities and NaN as stored."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    values = patterns[:, None].contiguous()
    out = linear(torch.ones(1, 1, dtype=dtype), values, None)[0]
    expected = patterns.clone()
    if level in ("avx512_bf16", "amx") and dtype == torch.bfloat16:
        expected[patterns.abs() < torch.finfo(dtype).tiny] = 0  # the instruction reads subnormals as zero
    assert torch.equal(out.nan_to_num(123.0), expected.nan_to_num(123.0))
    assert torch.equal(out.isnan(), expected.isnan())


VIEWS = {
    "rows of a wider tensor": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "one row expanded": lambda t: t[:1].expand(t.shape),
    "strided last dimension": lambda t: t.t().contiguous().t(),
    "every other channel": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("size", [96, 97])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_arguments(dtype: torch.dtype, size: int, view: object, level: str) -> None:
    x, weight = (view(draw(rows, size, dtype=dtype, seed=rows)) for rows in (4, 10))  # type: ignore[operator]
    bias = draw(20, dtype=dtype, seed=2)[::2]
    out = linear(x, weight, bias)
    assert out.is_contiguous()
    assert torch.equal(out, linear(x.contiguous(), weight.contiguous(), bias.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_the_arguments_is_nan(dtype: torch.dtype, level: str) -> None:
    """Neither the columns beside x and weight nor the rows after them are read as values."""
    wide_x, wide_weight = torch.full((5, 90), torch.nan, dtype=dtype), torch.full((9, 90), torch.nan, dtype=dtype)
    wide_x[:4, :77], wide_weight[:7, :77] = draw(4, 77, dtype=dtype), draw(7, 77, dtype=dtype, seed=1)
    assert_linear(wide_x[:4, :77], wide_weight[:7, :77])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype, level: str) -> None:
    x, weight = draw(4, 50, dtype=dtype), draw(6, 50, dtype=dtype, seed=1)
    clean = linear(x, weight, None)
    x[1, 7], weight[2, 3] = torch.nan, torch.inf
    out = linear(x, weight, None)
    assert out[1].isnan().all()
    kept = torch.ones(4, 6, dtype=torch.bool)
    kept[1], kept[:, 2] = False, False
    assert torch.equal(out[kept], clean[kept])
    assert not torch.isfinite(out[:, 2]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8, 16), (3, 0, 16), (3, 8, 0)])
def test_empty(shape: tuple[int, int, int], dtype: torch.dtype, level: str) -> None:
    tokens, rows, size = shape
    x, weight, bias = draw(tokens, size, dtype=dtype), draw(rows, size, dtype=dtype), draw(rows, dtype=dtype)
    assert torch.equal(linear(x, weight, bias), REFERENCES["linear"](x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_are_left_to_torch(dtype: torch.dtype, level: str) -> None:
    """Except where the instruction level has a product of its own."""
    if level in MANY[dtype]:
        pytest.skip("has a kernel of its own")
    x, weight = draw(300, 40, dtype=dtype), draw(30, 40, dtype=dtype, seed=1)
    assert torch.equal(linear(x, weight, None), REFERENCES["linear"](x, weight, None))


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def many(request: pytest.FixtureRequest, level: str) -> torch.dtype:
    """A dtype that has a product of its own for many tokens at `level`."""
    if level not in MANY[request.param]:
        pytest.skip("torch's own product serves many tokens at this level")
    dtype: torch.dtype = request.param
    return dtype


@pytest.mark.parametrize("size", [576, 577])
def test_a_token_among_many_depends_on_nothing_but_itself(size: int, many: torch.dtype) -> None:
    """Bit-equal in any batch of more than 64 tokens, on one thread and two."""
    x, weight = draw(533, size, dtype=many), draw(515, size, dtype=many, seed=1)
    bias = draw(515, dtype=many, seed=2)
    whole = linear(x, weight, bias)
    for first, end in ((0, 65), (7, 140), (200, 333), (255, 513)):
        assert torch.equal(linear(x[first:end], weight, bias), whole[first:end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear(x, weight, bias), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tokens", [80, 257])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_many_tokens_and_strided_arguments(view: object, tokens: int, many: torch.dtype) -> None:
    x, weight = (view(draw(rows, 97, dtype=many, seed=rows)) for rows in (tokens, 50))  # type: ignore[operator]
    out = linear(x, weight, None)
    assert torch.equal(out, linear(x.contiguous(), weight.contiguous(), None))


def test_many_tokens_with_nan_beside_and_within(many: torch.dtype) -> None:
    wide_x = torch.full((270, 90), torch.nan, dtype=many)
    wide_weight = torch.full((60, 90), torch.nan, dtype=many)
    wide_x[:, :77], wide_weight[:51, :77] = draw(270, 77, dtype=many), draw(51, 77, dtype=many)
    x, weight = wide_x[:, :77], wide_weight[:51, :77]
    assert_linear(x, weight)
    clean = linear(x, weight, None)
    x[3, 5] = torch.nan
    out = linear(x, weight, None)
    assert out[3].isnan().all()
    out[3] = clean[3]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_beside_where_torch_may_serve(dtype: torch.dtype, level: str) -> None:
    wide = torch.full((270, 90), torch.nan, dtype=dtype)
    wide[:, :77] = draw(270, 77, dtype=dtype)
    assert_linear(wide[:, :77], wide[:51, :77])


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 20) | st.integers(60, 140) | st.integers(250, 300),
    rows=st.integers(1, 40),
    size=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(LEVELS),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    tokens: int, rows: int, size: int, dtype: torch.dtype, name: str, with_bias: bool, seed: int
) -> None:
    x, weight = draw(tokens, size, dtype=dtype, seed=seed), draw(rows, size, dtype=dtype, seed=seed + 1)
    _C.set_cpu_level(name)
    try:
        assert_linear(x, weight, draw(rows, dtype=dtype, seed=seed + 2) if with_bias else None)
    finally:
        _C.set_cpu_level(LEVELS[-1])


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias: bool) -> None:
    x, weight = draw(3, 40, dtype=torch.bfloat16), draw(5, 40, dtype=torch.bfloat16)
    torch.library.opcheck(linear, (x, weight, draw(5, dtype=torch.bfloat16) if with_bias else None))


def test_errors_name_the_argument() -> None:
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"linear: expected x of two dimensions \[T, K\], got \[1, 2, 8\]"):
        linear(x[None], weight, None)
    with pytest.raises(ValueError, match=r"linear: expected x of dtype bfloat16, float16 or float32, got Double"):
        linear(x.double(), weight.double(), None)
    with pytest.raises(ValueError, match=r"linear: expected weight of shape \[N, 8\], got \[3, 7\]"):
        linear(x, torch.ones(3, 7), None)
    with pytest.raises(ValueError, match=r"linear: expected weight of dtype Float .*, got Half"):
        linear(x, weight.half(), None)
    with pytest.raises(ValueError, match=r"linear: expected bias of shape \[3\], got \[4\]"):
        linear(x, weight, torch.ones(4))
    with pytest.raises(ValueError, match=r"linear: expected bias of dtype Float .*, got BFloat16"):
        linear(x, weight, torch.ones(3).bfloat16())
    with pytest.raises(ValueError, match=r"set_cpu_level: expected name of one of generic.*, got sse9"):
        _C.set_cpu_level("sse9")
