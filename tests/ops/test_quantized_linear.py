"""The integer kernels of quantized_linear, against the same arithmetic in float64 and the dequantised weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from built import built

from depthprune_runtime import ops
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

_C = built()
RUN = 32
LEVELS = _C.cpu_levels()


@pytest.fixture(params=LEVELS)
def level(request):
    before = _C.cpu_level()
    _C.set_cpu_level(request.param)
    yield request.param
    _C.set_cpu_level(before)


def random_weight(spec: QuantSpec, rows: int, columns: int, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // spec.group_size)
    codes = torch.randint(0, spec.levels, (rows, columns), generator=generator)
    codes[0] = spec.levels - 1  # the largest products of a run
    scales = (torch.rand(rows, groups, generator=generator) * 0.1 + 0.01).bfloat16()
    zeros = None if spec.symmetric else torch.randint(0, spec.levels, (rows, groups), generator=generator)
    return QuantizedWeight.from_codes(spec, codes, scales, zeros)


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels read it: runs of 32 in 8 bits."""
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % RUN)).unflatten(1, (-1, RUN))
    largest = wide.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    codes = torch.round(wide * inverse)
    return (codes.double() * (largest / 127).double()).flatten(1)[:, : x.shape[1]]


SHAPES = [(1, 16, 32), (1, 96, 576), (2, 49, 100), (3, 33, 31), (5, 17, 257), (6, 64, 128), (7, 80, 96), (13, 40, 640)]


@pytest.mark.parametrize(
    "spec", [QuantSpec(*s) for s in itertools.product((8, 4), (32, 64, 128), (True, False))], ids=str
)
def test_kernels_do_the_arithmetic_that_they_claim(level, spec):
    for i, (tokens, rows, columns) in enumerate(SHAPES):
        weight = random_weight(spec, rows, columns, i)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(i))
        x[:, columns // 2] *= 1000  # an outlier channel
        bias = torch.randn(rows) if i % 2 else None
        expected = rounded_inputs(x) @ weight.dense(torch.float64).T + (0 if bias is None else bias.double())
        out = ops.quantized_linear(x, weight, bias)
        scale = rounded_inputs(x).abs() @ weight.dense(torch.float64).abs().T
        assert ((out - expected).abs() <= 1e-6 * scale + 1e-6).all(), (tokens, rows, columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats_are_rounded_once(level, dtype):
    weight = random_weight(QuantSpec(4, 32), 50, 96, 0)
    x, bias = torch.randn(3, 96).to(dtype), torch.randn(50).to(dtype)
    wide = ops.quantized_linear(x.float(), weight, bias.float())
    assert torch.equal(ops.quantized_linear(x, weight, bias), wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 16), (3, 64), (9, 80), (257, 96), (520, 208), (4, 40)], ids=str)
def test_gated_is_silu_mul_of_the_projection(level, dtype, tokens, channels):
    """Bit for bit, so that a decode step, which does one after the other, agrees with a prompt."""
    for spec, columns in ((QuantSpec(8, 32), 96), (QuantSpec(4, 64, False), 100)):
        weight = random_weight(spec, 2 * channels, columns, channels)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        for bias in (None, torch.randn(2 * channels).to(dtype)):
            expected = ops.silu_mul(ops.quantized_linear(x, weight, bias))
            out = ops.quantized_linear(x, weight, bias, gated=True)
            assert out.shape == (tokens, channels) and expected.abs().max() > 0
            assert torch.equal(out, expected)


def test_gated_needs_as_many_gates_as_ups(level):
    weight = random_weight(QuantSpec(8, 32), 33, 64, 0)
    with pytest.raises(ValueError, match="expected out_features of an even number"):
        ops.quantized_linear(torch.randn(2, 64), weight, gated=True)
    even = random_weight(QuantSpec(8, 32), 32, 64, 0)
    assert ops.quantized_linear(torch.empty(0, 64), even, gated=True).shape == (0, 16)


def test_close_to_the_dequantised_weight(level):
    """8-bit inputs cost about as much as bfloat16 ones."""
    for bits in (8, 4):
        weight = random_weight(QuantSpec(bits, 64), 256, 512, 1)
        x = torch.randn(4, 512)
        exact = x.double() @ weight.dense(torch.float64).T
        error = (ops.quantized_linear(x, weight) - exact).norm() / exact.norm()
        assert error < 0.01


def test_a_token_does_not_depend_on_its_batch(level):
    weight = random_weight(QuantSpec(4, 32, False), 100, 96, 2)
    x = torch.randn(29, 96).bfloat16()
    whole = ops.quantized_linear(x, weight)
    for count in (1, 2, 3, 6, 8):
        parts = [ops.quantized_linear(part, weight) for part in x.split(count)]
        assert torch.equal(torch.cat(parts), whole), count


def test_a_token_does_not_depend_on_the_number_of_threads(level):
    weight = random_weight(QuantSpec(8, 32), 1024, 576, 2)
    x = torch.randn(3, 576)
    before = torch.get_num_threads()
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs.append(ops.quantized_linear(x, weight))
    torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_inputs_that_are_not_finite_stay_visible(level):
    weight = random_weight(QuantSpec(8, 32), 16, 64, 3)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, 64)
        x[0, 40] = bad
        out = ops.quantized_linear(x, weight)
        assert out[0].isnan().all() and out[1].isfinite().all()


def test_zero_and_tiny_inputs():
    weight = random_weight(QuantSpec(8, 32), 16, 64, 3)
    assert torch.equal(ops.quantized_linear(torch.zeros(1, 64), weight), torch.zeros(1, 16))
    assert ops.quantized_linear(torch.full((1, 64), 1e-39), weight).isfinite().all()


def test_strided_inputs_and_empty_batches():
    weight = random_weight(QuantSpec(8, 32), 16, 64, 3)
    x = torch.randn(64, 5)
    assert torch.equal(ops.quantized_linear(x.T, weight), ops.quantized_linear(x.T.contiguous(), weight))
    assert torch.equal(ops.quantized_linear(x.T[1:3], weight), ops.quantized_linear(x.T.contiguous(), weight)[1:3])
    assert ops.quantized_linear(torch.empty(0, 64), weight).shape == (0, 16)


def test_wrong_arguments_are_named():
    weight = random_weight(QuantSpec(8, 32), 16, 64, 3)
    with pytest.raises(ValueError, match=r"expected x of shape \[T, 64\]"):
        ops.quantized_linear(torch.randn(1, 32), weight)
    with pytest.raises(ValueError, match="expected bias of shape"):
        ops.quantized_linear(torch.randn(1, 64), weight, torch.randn(3))
    op = torch.ops.depthprune.quantized_linear
    with pytest.raises(ValueError, match="expected codes of shape"):
        op(torch.randn(1, 96), weight.codes, weight.scales, None, None, 16, 8, 32, False)
    with pytest.raises(ValueError, match="expected bits of 8 or 4"):
        op(torch.randn(1, 64), weight.codes, weight.scales, None, None, 16, 3, 32, False)
