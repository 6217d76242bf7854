"""GPTQ against the loop that it is a fast form of, and against round to nearest."""

from __future__ import annotations

import pytest
import torch

from depthprune_runtime.quantization import gptq as module
from depthprune_runtime.quantization.gptq import gptq
from depthprune_runtime.quantization.rtn import choose_grid, rtn
from depthprune_runtime.weights.quantized import QuantSpec

SPECS = [QuantSpec(4, 32), QuantSpec(4, 64, False), QuantSpec(8, 32)]


def problem(rows=24, columns=80, tokens=400, seed=0):
    """A weight, and inputs of strongly correlated columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + 3 * torch.randn(1, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.rand(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x, x.T @ x / tokens


def brute_force(weight, gram, spec, damping):
    """Optimal brain quantisation column by column, in the order of the diagonal, by a fresh inverse each time."""
    grid = choose_grid(weight, spec, gram.diagonal())
    system = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    left = gram.diagonal().argsort(descending=True, stable=True)
    moving = weight.double().clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    while len(left):
        inverse = torch.linalg.inv(system[left][:, left])
        k = left[0]
        column = grid.columns(left[:1])
        code = column.encode(moving[:, left[:1]].float())
        codes[:, k] = code[:, 0].to(torch.uint8)
        error = (moving[:, k] - column.decode(code)[:, 0]) / inverse[0, 0]
        moving[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_the_brute_force_loop(spec, monkeypatch):
    weight, _, gram = problem()
    monkeypatch.setattr(module, "_BLOCK", 16)
    monkeypatch.setattr(module, "_STRIP_ELEMENTS", 700)
    assert torch.equal(gptq(weight, gram, spec).unpack(), brute_force(weight, gram, spec, 0.01))


def test_damping_is_that_of_the_authors():
    """One percent of the mean diagonal, in their code too: it decides codes where inputs are correlated."""
    assert module.DAMPING == 0.01
    weight, _, gram = problem()
    found = gptq(weight, gram, SPECS[0]).unpack()
    assert not torch.equal(found, gptq(weight, gram, SPECS[0], damping=0.1).unpack())
    assert not torch.equal(found, gptq(weight, gram, SPECS[0], damping=0.001).unpack())


@pytest.mark.parametrize("spec", SPECS)
def test_outputs_err_less_than_those_of_rtn(spec):
    weight, x, gram = problem(columns=200)

    def error(found):
        return float((x @ (found.dense() - weight).T).square().sum())

    ours = error(gptq(weight, gram, spec))
    assert ours < 0.5 * error(rtn(weight, spec, gram.diagonal()))
    assert ours < 0.5 * error(rtn(weight, spec))


def test_inputs_without_correlation_leave_nothing_to_make_up_for():
    weight, spec = problem()[0], QuantSpec(4, 32)
    gram = torch.rand(80).diag()
    assert torch.equal(gptq(weight, gram, spec).codes, rtn(weight, spec, gram.diagonal()).codes)


def test_dead_inputs_do_no_harm():
    weight, x, _ = problem()
    x[:, 5:20] = 0
    found = gptq(weight, x.T @ x / len(x), QuantSpec(4, 32)).dense()
    assert torch.isfinite(found).all()
    silent = gptq(weight, torch.zeros(80, 80), QuantSpec(4, 32))
    assert torch.isfinite(silent.dense()).all()
