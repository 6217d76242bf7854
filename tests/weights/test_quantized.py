"""The layout of quantised weights: codes come back, values mean what the formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime import ops
from depthprune_runtime.errors import InputError
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec


def random_weight(spec: QuantSpec, rows: int, columns: int, seed: int = 0) -> tuple[QuantizedWeight, torch.Tensor]:
    """A weight with random codes, and its values by the formula."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // spec.group_size)
    codes = torch.randint(0, spec.levels, (rows, columns), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) * 0.1 + 0.01).bfloat16()
    zeros = None if spec.symmetric else torch.randint(0, spec.levels, (rows, groups), generator=generator)
    expected = torch.empty(rows, columns)
    for k in range(columns):
        g = k // spec.group_size
        zero = spec.levels / 2 if zeros is None else zeros[:, g]
        expected[:, k] = scales[:, g].float() * (codes[:, k] - zero)
    return QuantizedWeight.from_codes(spec, codes, scales, zeros), expected


specs = st.builds(QuantSpec, st.sampled_from([8, 4]), st.sampled_from([32, 64, 128]), st.booleans())


@settings(max_examples=40, deadline=None)
@given(specs, st.integers(1, 40), st.integers(1, 200))
def test_dequantize_is_the_formula(spec, rows, columns):
    weight, expected = random_weight(spec, rows, columns)
    assert torch.equal(weight.dense(), expected)
    index = torch.randint(0, rows, (5,))
    assert torch.equal(weight.rows(index, torch.float32), expected[index])


def test_dense_by_strips_is_the_formula_too(monkeypatch):
    """Strips of three panels, the last of them short."""
    monkeypatch.setattr("depthprune_runtime.weights.quantized._STRIP_ELEMENTS", 3 * 16 * 70)
    weight, expected = random_weight(QuantSpec(4, 32, False), 202, 70)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.dense(dtype), expected.to(dtype))


def test_reference_op_multiplies_by_the_dequantised_weight():
    weight, expected = random_weight(QuantSpec(4, 32), 24, 96)
    x, bias = torch.randn(3, 96), torch.randn(24)
    reference = torch.nn.functional.linear(x, expected, bias)
    out = ops._library.REFERENCES["quantized_linear"](x, weight.codes, weight.scales, None, bias, 24, 4, 32, False)
    assert torch.equal(out, reference)


@pytest.mark.parametrize("arguments", [(3, 32), (4, 48), (8, 0)])
def test_spec_refuses_other_sizes(arguments):
    with pytest.raises(InputError, match="expected"):
        QuantSpec(*arguments)


def test_parts_of_other_shapes_are_refused():
    weight, _ = random_weight(QuantSpec(8, 32), 16, 64)
    with pytest.raises(ValueError, match="expected scales of shape"):
        QuantizedWeight(weight.spec, 16, 64, weight.codes, weight.scales[:, :1])
