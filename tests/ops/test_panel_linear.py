"""Products by weights in panels against plain torch, at every instruction level that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_as_accurate
from built import built
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import plain
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.kernels.packed import check_packed
from depthprune_runtime.ops import implementations
from depthprune_runtime.weights.packed import pack
from depthprune_runtime.weights.panels import PanelWeight, from_panels, panel_shape, panels_pay, to_panels

_C = built()
LEVELS = _C.cpu_levels()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_cpu_level(request.param)
    yield request.param
    _C.set_cpu_level(LEVELS[-1])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def packed(weight: Tensor) -> PanelWeight:
    panels = torch.full(panel_shape(*weight.shape), torch.nan, dtype=torch.bfloat16)
    return ops.pack_panels(weight, panels)


def assert_product(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> None:
    reference = plain("gated_linear" if gated else "linear")
    truth = reference(x.double(), weight.double(), None if bias is None else bias.double())
    found = ops.panel_linear(x, packed(weight), bias, gated)
    assert_as_accurate(found, reference(x, weight, bias), truth, "panel_linear")


def test_cpp_serves_the_cpu_and_panels_pay_where_it_has_kernels() -> None:
    assert implementations("panel_linear")["CPU"] == implementations("pack_panels")["CPU"] == "native"
    assert panels_pay() == (LEVELS[-1] != "generic")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17, 31, 64, 65, 100])
@pytest.mark.parametrize("gated", [False, True])
def test_against_torch(tokens: int, gated: bool, with_bias: bool, level: str) -> None:
    for rows, size in ((96, 64), (160, 33), (64, 577)):
        x, weight = draw(tokens, size, seed=0), draw(rows, size, seed=1) * 0.2
        assert_product(x, weight, draw(rows, seed=2) if with_bias else None, gated)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 20) | st.integers(60, 140),
    rows=st.integers(1, 120),
    size=st.integers(1, 150),
    name=st.sampled_from(LEVELS),
    seed=st.integers(0, 2**31),
)
def test_any_shape(tokens: int, rows: int, size: int, name: str, seed: int) -> None:
    _C.set_cpu_level(name)
    try:
        assert_product(draw(tokens, size, seed=seed), draw(rows, size, seed=seed + 1), draw(rows, seed=seed + 2), False)
    finally:
        _C.set_cpu_level(LEVELS[-1])


@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize("gated", [False, True])
def test_a_token_depends_on_nothing_but_itself(size: int, gated: bool, level: str) -> None:
    """Bit-equal in any batch, on any number of threads; with AMX only among batches of the same unit."""
    x, weight, bias = draw(200, size, seed=3), packed(draw(416, size, seed=4) * 0.3), draw(416, seed=5)
    whole = ops.panel_linear(x, weight, bias, gated)
    few = ops.panel_linear(x[:64], weight, bias, gated)
    if level != "amx":
        assert torch.equal(few, whole[:64])
    for tokens in (1, 2, 5, 8, 9, 16, 17, 33):
        assert torch.equal(ops.panel_linear(x[:tokens], weight, bias, gated), few[:tokens])
    assert torch.equal(ops.panel_linear(x[70:150], weight, bias, gated), whole[70:150])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(ops.panel_linear(x, weight, bias, gated), whole)
            assert torch.equal(ops.panel_linear(x[:5], weight, bias, gated), few[:5])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tokens", [9, 16])
def test_tokens_a_page_apart(tokens: int, level: str) -> None:
    """Rows of 2048 and 4096 elements meet in the same cache lines, and are moved apart: nothing else changes."""
    for size in (2048, 4096):
        x, weight, bias = draw(tokens, size, seed=10), packed(draw(48, size, seed=11)), draw(48, seed=12)
        elsewhere = torch.full((tokens, size + 8), torch.nan, dtype=torch.bfloat16)[:, :size].copy_(x)
        found = ops.panel_linear(x, weight, bias)
        assert torch.equal(found, ops.panel_linear(elsewhere, weight, bias))
        assert torch.equal(found[-1:], ops.panel_linear(x[-1:], weight, bias))


def test_what_lies_beside_is_not_read(level: str) -> None:
    for tokens in (3, 70):
        wide = torch.full((tokens, 90), torch.nan, dtype=torch.bfloat16)
        wide[:, :77] = draw(tokens, 77, seed=6)
        weight = packed(draw(51, 77, seed=7))
        found = ops.panel_linear(wide[:, :77], weight)
        assert found.isfinite().all()
        assert torch.equal(found, ops.panel_linear(wide[:, :77].contiguous(), weight))


def test_nan_stays_in_its_token(level: str) -> None:
    x, weight = draw(70, 50, seed=8), packed(draw(40, 50, seed=9))
    clean = ops.panel_linear(x, weight)
    x[1, 7] = torch.nan
    found = ops.panel_linear(x, weight)
    assert found[1].isnan().all()
    found[1] = clean[1]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (100, 95), (5, 1000)])
def test_packing(shape: tuple[int, int], level: str) -> None:
    weight = draw(*shape, seed=10)
    found = packed(weight)
    assert torch.equal(found.panels, to_panels(weight))
    assert torch.equal(from_panels(found.panels, *shape), weight)
    assert torch.equal(found.dense(), weight)
    index = torch.randint(0, shape[0], (7,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.rows(index, torch.bfloat16), weight[index])
    strided = torch.cat([weight, weight], 1)[:, : shape[1]]
    assert torch.equal(packed(strided).panels, found.panels)


def test_no_tokens(level: str) -> None:
    weight = packed(draw(48, 40, seed=12))
    assert torch.equal(ops.panel_linear(draw(0, 40, seed=11), weight), torch.empty(0, 48, dtype=torch.bfloat16))


def test_the_fused_ops_take_panels_on_the_cpu_and_their_gpu_kernels_refuse_them() -> None:
    x, residual, weight = draw(3, 40, seed=18), draw(3, 48, seed=19), packed(draw(48, 40, seed=20))
    expected = residual + ops.panel_linear(x, weight)
    ops.linear_add(x, residual, weight)
    assert torch.equal(residual, expected)
    with pytest.raises(ValueError, match="linear_add: expected a weight in rows or quantised, got panels"):
        check_packed("linear_add", x, *pack(weight), None)


def test_opcheck() -> None:
    weight = packed(draw(64, 40, seed=13))
    for bias, gated in ((None, False), (draw(64, seed=14), True)):
        arguments = (draw(3, 40, seed=15), weight.panels, bias, 64, gated)
        torch.library.opcheck(torch.ops.depthprune.panel_linear.default, arguments)


def test_errors_name_the_argument() -> None:
    x, weight = draw(2, 40, seed=16), packed(draw(48, 40, seed=17))
    with pytest.raises(ValueError, match=r"panel_linear: expected x of shape \[T, 40\], got \[2, 39\]"):
        ops.panel_linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"panel_linear: expected out_features of a multiple of 32, gated, got 48"):
        ops.panel_linear(x, weight, gated=True)
    with pytest.raises(ValueError, match=r"panel_linear: expected bias of shape \[48\].*got \[47\]"):
        ops.panel_linear(x, weight, draw(47, seed=0))
    with pytest.raises(ValueError, match=r"panel_linear: expected x of dtype bfloat16, got Float"):
        ops.panel_linear(x.float(), weight)
    with pytest.raises(
        ValueError, match=r"pack_panels: expected panels of shape \[3, 32, 16, 2\].*got \[3, 32, 16, 1\]"
    ):
        ops.pack_panels(draw(48, 40, seed=0), torch.empty(3, 32, 16, 1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"PanelWeight: expected panels of shape \[3, 32, 16, 2\] in bfloat16"):
        PanelWeight(weight.panels.float(), 48, 40)
