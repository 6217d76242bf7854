"""Round to nearest: how far a weight may move, and that a searched grid errs less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime.quantization import rtn as module
from depthprune_runtime.quantization.rtn import choose_grid, rtn
from depthprune_runtime.weights.quantized import QuantSpec

SPECS = [QuantSpec(bits, 32, symmetric) for bits in (8, 4) for symmetric in (True, False)]
specs = st.builds(QuantSpec, st.sampled_from([8, 4]), st.sampled_from([32, 64, 128]), st.booleans())


def random_weight(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(rows, 1, generator=generator)
    return torch.randn(rows, columns, generator=generator) + shift


def steps(weight, spec):
    """Size of the step of every element."""
    scales = choose_grid(weight, spec).scales.abs()
    return scales.repeat_interleave(spec.group_size, 1)[:, : weight.shape[1]]


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(1, 20), st.integers(1, 150), st.integers(0, 1000))
def test_every_weight_stays_within_half_a_step(spec, rows, columns, seed):
    weight = random_weight(rows, columns, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_RATIOS", {8: (1.0,), 4: (1.0,)})  # no clipping
        step = steps(weight, spec)
        error = (rtn(weight, spec).dense() - weight).abs()
    assert (error <= 0.5001 * step).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_errs_less(symmetric, monkeypatch):
    weight, spec = random_weight(32, 256), QuantSpec(4, 64, symmetric)
    importance = torch.rand(256)

    def error(of):
        return float((importance * (rtn(weight, spec, of).dense() - weight).square()).sum())

    searched = error(importance)
    assert searched < error(None)
    monkeypatch.setattr(module, "_RATIOS", {4: (1.0,)})
    assert searched < error(importance)


@pytest.mark.parametrize("spec", SPECS)
def test_weights_on_a_grid_come_back(spec):
    """Codes of the whole range times a power of two are kept exactly."""
    zero = spec.levels // 2 if spec.symmetric else 3
    codes = torch.arange(64).remainder(spec.levels).view(2, 32)
    codes[:, 0], codes[:, 1] = 0, spec.levels - 1
    weight = 0.25 * (codes - zero).float()
    assert torch.equal(rtn(weight, spec).dense(), weight)
    assert torch.equal(rtn(-weight, spec).dense(), -weight)


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_and_outliers(spec):
    weight = torch.zeros(3, 64)
    weight[1, 40] = -7.0
    weight[2] = 5.0
    found = rtn(weight, spec).dense()
    assert torch.equal(found[0], weight[0])
    assert torch.equal(found[1, :32], weight[1, :32])
    assert (found - weight).abs().max() < 0.5 * 7 / (spec.levels / 2 - 1)


def test_strips_change_nothing(monkeypatch):
    weight, spec = random_weight(40, 96), QuantSpec(4, 32, False)
    whole = rtn(weight, spec)
    monkeypatch.setattr(module, "_STRIP_ELEMENTS", 300)
    assert torch.equal(rtn(weight, spec).codes, whole.codes)
