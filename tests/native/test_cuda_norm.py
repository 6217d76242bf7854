"""The norms of csrc/cuda, bindings and kernels, emulated or on a GPU, compared by the rule of accuracy.py."""

from __future__ import annotations

import ctypes

import pytest
import torch
from accuracy import assert_as_accurate
from emulation import call
from torch import Tensor

from depthprune_runtime.ops._library import REFERENCES

pytestmark = pytest.mark.usefixtures("target", "poisoned_memory")

EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# One lane and 128 rows a block; odd; short rows; whole warps; a scalar row; two chunks a thread; rows read again.
SHAPES = [(150, 1), (20, 7), (9, 64), (9, 256), (3, 576), (3, 577), (2, 4096), (1, 8200), (1, 16384), (1, 20001)]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values with one outlier channel, as trained models have."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., shape[-1] // 3] *= 1000
    return x.to(dtype)


def gain(*shape: int, dtype: torch.dtype) -> Tensor:
    return (1 + 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(9))).to(dtype)


def unaligned(x: Tensor) -> Tensor:
    """The same values one element after an address that vectors could be loaded from; its neighbours are NaN."""
    moved = torch.full((x.numel() + 16,), torch.nan, dtype=x.dtype)[1 : x.numel() + 1].view(x.shape)
    assert moved.data_ptr() % 16 == x.element_size()
    return moved.copy_(x)


def true_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, wide_weight: bool) -> None:
    x, weight = draw(*shape, dtype=dtype), gain(shape[-1], dtype=torch.float32 if wide_weight else dtype)
    out = call("rms_norm", x, weight, EPS)
    assert_as_accurate(out, REFERENCES["rms_norm"](x, weight, EPS), true_norm(x, weight))
    assert torch.equal(out, call("rms_norm", unaligned(x), weight, EPS)), "alignment must not change a result"
    assert torch.equal(out, call("rms_norm", x, unaligned(weight), EPS))


@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, wide_weight: bool) -> None:
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    weight = gain(shape[-1], dtype=torch.float32 if wide_weight else dtype)
    expected, aligned, moved = residual.clone(), residual.clone(), unaligned(residual)
    baseline = REFERENCES["add_rms_norm"](x, expected, weight, EPS)
    out = call("add_rms_norm", x, aligned, weight, EPS)
    assert torch.equal(aligned, expected), "the sum is one rounding: it must be torch's, bit for bit"
    assert_as_accurate(out, baseline, true_norm(x.double() + residual.double(), weight))
    assert torch.equal(out, call("add_rms_norm", x, moved, weight, EPS)), "alignment must not change a result"
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("shape", [(5, 3, 64), (4, 9, 128), (3, 2, 10), (2, 3, 1), (2, 2, 600)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_rms_norm(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """q of a packed [T, (H + 2K) D] projection, whose other parts are NaN and stay so."""
    tokens, heads, dim = shape
    packed = torch.full((tokens, heads + 2, dim), torch.nan, dtype=dtype)
    q = packed[:, 1:-1]
    q.copy_(draw(*shape, dtype=dtype))
    weight = gain(heads, dim, dtype=dtype)
    truth, baseline = true_norm(q, weight), q.clone()
    REFERENCES["head_rms_norm"](baseline, weight, EPS)
    call("head_rms_norm", q, weight, EPS)
    assert_as_accurate(q, baseline, truth)
    assert packed[:, 0].isnan().all()
    assert packed[:, -1].isnan().all()


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("hidden_size", [7, 64, 577, 4096, 10000])
def test_order_of_threads_and_rows_do_not_matter(hidden_size: int) -> None:
    x, weight = draw(4, hidden_size, dtype=torch.bfloat16), gain(hidden_size, dtype=torch.bfloat16)
    first = call("rms_norm", x, weight, EPS)
    assert torch.equal(first, call("rms_norm", x, weight, EPS))
    assert torch.equal(first, torch.cat([call("rms_norm", row, weight, EPS) for row in x.split(1)]))
    assert_as_accurate(first, REFERENCES["rms_norm"](x, weight, EPS), true_norm(x, weight))


VIEWS = {
    "rows of a wider tensor": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row expanded": lambda x: x[:1].expand(x.shape),
    "strided last dimension": lambda x: x.t().contiguous().t(),
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "permuted heads": lambda x: x.view(4, 2, 3, -1).permute(2, 0, 1, 3),
    "heads of a wider tensor": lambda x: torch.cat([x.view(8, 3, -1)] * 2, 1)[:, :3],
    "one dimension": lambda x: x[0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strided_input(view: object) -> None:
    x = view(draw(24, 80, dtype=torch.bfloat16))  # type: ignore[operator]
    weight = gain(x.shape[-1], dtype=torch.bfloat16)
    out = call("rms_norm", x, weight, EPS)
    assert torch.equal(out, call("rms_norm", x.contiguous(), weight, EPS))
    assert out.stride() == REFERENCES["rms_norm"](x, weight, EPS).stride()
    assert torch.equal(call("rms_norm", x, weight.repeat_interleave(2)[::2], EPS), out)


@pytest.mark.parametrize("view", ["rows of a wider tensor", "strided last dimension", "every other channel"])
def test_strided_residual_is_updated_in_place(view: str) -> None:
    x, residual = (VIEWS[view](draw(24, 80, dtype=torch.bfloat16, seed=i)) for i in (0, 1))
    weight, dense = gain(80, dtype=torch.bfloat16), residual.contiguous().clone()
    out = call("add_rms_norm", x, residual, weight, EPS)
    assert torch.equal(out, call("add_rms_norm", x.contiguous(), dense, weight, EPS))
    assert torch.equal(residual, dense)


def test_writes_nothing_beside_the_residual() -> None:
    wide = torch.full((3, 40), 7.0)
    call("add_rms_norm", torch.randn(3, 17), wide[:, 5:22], torch.ones(17), EPS)
    assert (wide[:, :5] == 7).all()
    assert (wide[:, 22:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value_survives(dtype: torch.dtype) -> None:
    """Shows that the emulated types convert as torch's do: subnormals, infinities, NaN."""
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(16, 4096).view(dtype).clone()
    expected = values + torch.zeros_like(values)
    call("add_rms_norm", torch.zeros_like(values), values, torch.ones(4096, dtype=dtype), EPS)
    assert torch.equal(values.nan_to_num(123.0), expected.nan_to_num(123.0))
    assert torch.equal(values.isnan(), expected.isnan())


@pytest.mark.parametrize("shape", [(0, 576), (0, 3, 64)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.ones(shape[-1])
    assert call("rms_norm", x, weight, EPS).shape == shape
    assert call("add_rms_norm", x, x.clone(), weight, EPS).shape == shape


def test_errors_name_the_argument() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of shape \[8\], got \[7\]"):
        call("rms_norm", x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: expected x of dtype bfloat16, float16 or float32, got Double"):
        call("rms_norm", x.double(), weight.double(), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of dtype Float .*, got Half"):
        call("rms_norm", x, weight.half(), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of device \S+ \(that of x\), got meta"):
        call("rms_norm", x, weight.to("meta"), EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: expected residual of shape \[2, 8\].*, got \[1, 8\]"):
        call("add_rms_norm", x, torch.ones(1, 8), weight, EPS)
    with pytest.raises(ValueError, match=r"head_rms_norm: expected weight of shape \[2, 4\], got \[4\]"):
        call("head_rms_norm", torch.ones(3, 2, 4), torch.ones(4), EPS)


def test_a_refused_launch_is_an_error(emulated: ctypes.CDLL, target: str) -> None:
    if target == "gpu":
        pytest.skip("a GPU refuses no launch of these")
    emulated.refuse_launches(True)
    try:
        with pytest.raises(RuntimeError, match="add_rms_norm: the launch failed: invalid configuration argument"):
            call("add_rms_norm", torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), EPS)
    finally:
        emulated.refuse_launches(False)
