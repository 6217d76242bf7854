"""The CPU kernels of rms_norm and add_rms_norm against plain torch, called as the dispatcher calls them."""

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

built()  # where the extension was left out, these tests are skipped

EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 576), (3, 1), (2, 7), (5, 577), (4, 2048), (130, 576), (1, 16384)]
rms_norm = torch.ops.depthprune.rms_norm.default
add_rms_norm = torch.ops.depthprune.add_rms_norm.default


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values with one outlier channel, as trained models have."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., shape[-1] // 3] *= 1000
    return x.to(dtype)


def gain(size: int, dtype: torch.dtype) -> Tensor:
    return (1 + 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(9))).to(dtype)


def true_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x.double(), weight.shape, weight.double(), EPS)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_extension_serves_the_cpu() -> None:
    assert implementations("rms_norm")["CPU"] == "native"
    assert implementations("add_rms_norm")["CPU"] == "native"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, wide_weight: bool) -> None:
    x = draw(*shape, dtype=dtype)
    weight = gain(shape[-1], torch.float32 if wide_weight else dtype)
    assert_as_accurate(rms_norm(x, weight, EPS), REFERENCES["rms_norm"](x, weight, EPS), true_norm(x, weight))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, wide_weight: bool) -> None:
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    weight = gain(shape[-1], torch.float32 if wide_weight else dtype)
    expected_residual = residual + x
    baseline_residual, native_residual = residual.clone(), residual.clone()
    baseline = REFERENCES["add_rms_norm"](x, baseline_residual, weight, EPS)
    out = add_rms_norm(x, native_residual, weight, EPS)
    assert torch.equal(native_residual, expected_residual), "the sum is one rounding: it must be torch's, bit for bit"
    assert_as_accurate(out, baseline, true_norm(x.double() + residual.double(), weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_outliers(dtype: torch.dtype) -> None:
    x = torch.randn(33, 576, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight = gain(576, dtype)
    assert_as_accurate(rms_norm(x, weight, EPS), REFERENCES["rms_norm"](x, weight, EPS), true_norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bit_equal(dtype: torch.dtype) -> None:
    x, weight = draw(300, 577, dtype=dtype), gain(577, dtype)
    first = rms_norm(x, weight, EPS)
    assert torch.equal(first, rms_norm(x, weight, EPS))
    alone = torch.cat([rms_norm(row, weight, EPS) for row in x.split(1)])
    assert torch.equal(first, alone), "a token's result must not depend on its batch"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_wider_projection(dtype: torch.dtype) -> None:
    """q of a packed [T, (H + 2K) D] projection: rows do not merge, and the neighbours are NaN."""
    packed = torch.full((6, 5 * 64), torch.nan, dtype=dtype)
    packed[:, :192] = draw(6, 192, dtype=dtype)
    heads = packed[:, :192].view(6, 3, 64)
    weight = gain(64, dtype)
    out = rms_norm(heads, weight, EPS)
    assert_as_accurate(out, REFERENCES["rms_norm"](heads, weight, EPS), true_norm(heads, weight))
    assert torch.equal(out, rms_norm(heads.contiguous(), weight, EPS))


VIEWS = {
    "rows of a wider tensor": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row expanded": lambda x: x[:1].expand(x.shape),
    "strided last dimension": lambda x: x.t().contiguous().t(),
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "permuted heads": lambda x: x.view(4, 2, 3, -1).permute(2, 0, 1, 3),
    "one dimension": lambda x: x[0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strided_input(view: object) -> None:
    x = view(draw(24, 80, dtype=torch.bfloat16))  # type: ignore[operator]
    weight = gain(x.shape[-1], torch.bfloat16)
    out = rms_norm(x, weight, EPS)
    assert torch.equal(out, rms_norm(x.contiguous(), weight, EPS))
    assert out.stride() == REFERENCES["rms_norm"](x, weight, EPS).stride()
    assert torch.equal(rms_norm(x, weight.repeat_interleave(2)[::2], EPS), out)


@pytest.mark.parametrize("view", ["rows of a wider tensor", "strided last dimension", "every other channel"])
def test_strided_residual_is_updated_in_place(view: str) -> None:
    x = VIEWS[view](draw(24, 80, dtype=torch.bfloat16))
    weight = gain(80, torch.bfloat16)
    residual = VIEWS[view](draw(24, 80, dtype=torch.bfloat16, seed=1))
    dense = residual.contiguous().clone()
    strides = REFERENCES["add_rms_norm"](x, residual.clone(), weight, EPS).stride()
    out = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(out, add_rms_norm(x.contiguous(), dense, weight, EPS))
    assert torch.equal(residual, dense)
    assert out.stride() == strides


def test_writes_nothing_beside_the_residual() -> None:
    wide = torch.full((3, 40), 7.0)
    add_rms_norm(torch.randn(3, 17), wide[:, 5:22], torch.ones(17), EPS)
    assert (wide[:, :5] == 7).all()
    assert (wide[:, 22:] == 7).all()


@pytest.mark.parametrize("shape", [(0, 576), (0, 3, 64)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.ones(shape[-1])
    assert rms_norm(x, weight, EPS).shape == shape
    assert add_rms_norm(x, x.clone(), weight, EPS).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype: torch.dtype) -> None:
    weight = torch.ones(40, dtype=dtype)
    assert torch.equal(rms_norm(torch.zeros(1, 40, dtype=dtype), weight, EPS), torch.zeros(1, 40, dtype=dtype))
    for value in (torch.nan, torch.inf):
        x = torch.ones(2, 40, dtype=dtype)
        x[0, 3] = value
        out = rms_norm(x, weight, EPS)
        assert torch.equal(out.isnan(), REFERENCES["rms_norm"](x, weight, EPS).isnan())
        assert torch.isfinite(out[1]).all()


def test_every_half_precision_value_survives() -> None:
    """A residual of every bit pattern plus zero comes back as torch has it: subnormals, infinities, NaN."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(256, 256)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype).clone()
        expected = values + torch.zeros_like(values)
        add_rms_norm(torch.zeros_like(values), values, torch.ones(256, dtype=dtype), EPS)
        assert torch.equal(values.nan_to_num(123.0), expected.nan_to_num(123.0))
        assert torch.equal(values.isnan(), expected.isnan())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    hidden_size=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 60.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_scale(rows: int, hidden_size: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual = ((scale * torch.randn(rows, hidden_size, generator=generator)).to(dtype) for _ in range(2))
    weight = gain(hidden_size, dtype)
    assert_as_accurate(rms_norm(x, weight, EPS), REFERENCES["rms_norm"](x, weight, EPS), true_norm(x, weight))
    baseline_residual, native_residual = residual.clone(), residual.clone()
    baseline = REFERENCES["add_rms_norm"](x, baseline_residual, weight, EPS)
    out = add_rms_norm(x, native_residual, weight, EPS)
    assert torch.equal(native_residual, baseline_residual)
    assert_as_accurate(out, baseline, true_norm(x.double() + residual.double(), weight))


@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape, dtype=torch.bfloat16), gain(40, torch.bfloat16)
    torch.library.opcheck(rms_norm, (x, weight, EPS))
    torch.library.opcheck(add_rms_norm, (x, x.clone(), weight, EPS))


def test_errors_name_the_argument() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of shape \[8\], got \[7\]"):
        rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: expected x of dtype bfloat16, float16 or float32, got Double"):
        rms_norm(x.double(), weight.double(), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of dtype Float .*, got Half"):
        rms_norm(x, weight.half(), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: expected x of at least one dimension"):
        rms_norm(torch.tensor(1.0), weight, EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: expected residual of shape \[2, 8\].*, got \[1, 8\]"):
        add_rms_norm(x, torch.ones(1, 8), weight, EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: expected residual of .* dtype Float.*, got .*BFloat16"):
        add_rms_norm(x, torch.ones(2, 8).bfloat16(), weight, EPS)
