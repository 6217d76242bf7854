"""Distances against loops over tokens in float64 and against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from depthprune_runtime import InputError
from depthprune_runtime.pruning.finercut import distances
from depthprune_runtime.pruning.finercut.distances import OutputDistance
from depthprune_runtime.pruning.finercut.options import DISTANCES

N, S, V = 3, 5, 37
WINDOWS = torch.randint(0, V, (N, S), generator=torch.Generator().manual_seed(1))


def logits(seed: int, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(N * S, V, generator=torch.Generator().manual_seed(seed)) * scale


DENSE, PRUNED = logits(2), logits(3)


def measure(name, dense, pruned):
    return OutputDistance(name, WINDOWS, dense, lambda hidden: hidden)(pruned)


def probabilities(row):
    exponentials = [math.exp(float(v)) for v in row]
    return [e / sum(exponentials) for e in exponentials]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_loops(name, dense, pruned):
    tokens = []
    for x, y in zip(dense.double(), pruned.double(), strict=True):
        p, q = probabilities(x), probabilities(y)
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        if name == "kl":
            tokens.append(kl(p, q))
        elif name == "js":
            tokens.append(0.5 * (kl(p, m) + kl(q, m)))
        elif name == "js_reverse":
            tokens.append(0.5 * (kl(m, p) + kl(m, q)))
        elif name == "angular":
            tokens.append(math.acos(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))))
    if name == "norm":
        windows = (dense - pruned).double().view(N, S * V).tolist()
        return sum(math.sqrt(sum(v * v for v in w)) for w in windows) / N
    if name == "perplexity":
        for n in range(N):
            for s in range(S - 1):
                tokens.append(-math.log(probabilities(pruned[n * S + s])[int(WINDOWS[n, s + 1])]))
        return math.exp(sum(tokens) / len(tokens))
    return sum(tokens) / len(tokens)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_distances_equal_loops_over_tokens(name, rows, monkeypatch):
    monkeypatch.setattr(distances, "_CHUNK_ELEMENTS", rows * V)
    assert measure(name, DENSE, PRUNED) == pytest.approx(by_loops(name, DENSE, PRUNED), rel=1e-5)


def test_divergences_equal_torch_distributions():
    p, q = Categorical(logits=DENSE.double()), Categorical(logits=PRUNED.double())
    m = Categorical(probs=(p.probs + q.probs) / 2)
    expected = {
        "kl": kl_divergence(p, q),
        "js": 0.5 * (kl_divergence(p, m) + kl_divergence(q, m)),
        "js_reverse": 0.5 * (kl_divergence(m, p) + kl_divergence(m, q)),
    }
    for name, values in expected.items():
        assert measure(name, DENSE, PRUNED) == pytest.approx(float(values.mean()), rel=1e-5)


@pytest.mark.parametrize("name", [d for d in DISTANCES if d != "perplexity"])
def test_equal_outputs_have_no_distance(name):
    assert measure(name, DENSE, DENSE) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["js", "js_reverse", "angular", "kl"])
def test_small_distances_keep_their_digits(name):
    """Early removals differ little; float32 formulas that subtract large terms would return noise."""
    near = DENSE + 1e-2 * PRUNED
    assert measure(name, DENSE, near) == pytest.approx(by_loops(name, DENSE, near), rel=2e-2)


@pytest.mark.parametrize("name", ["js", "js_reverse"])
def test_jensen_shannon_is_symmetric_and_finite_for_disjoint_outputs(name):
    assert measure(name, DENSE, PRUNED) == pytest.approx(measure(name, PRUNED, DENSE), rel=1e-5)
    value = measure(name, DENSE * 1e3, -DENSE * 1e3)
    assert math.isfinite(value)
    if name == "js":
        assert value == pytest.approx(math.log(2), rel=1e-3)  # its largest value


def test_the_reference_is_kept_in_the_dtype_of_the_logits():
    half = OutputDistance("kl", WINDOWS, DENSE.bfloat16(), lambda hidden: hidden)
    assert half.reference_bytes == N * S * V * 2
    assert half(DENSE.bfloat16()) == pytest.approx(0.0, abs=1e-6)
    assert OutputDistance("perplexity", WINDOWS, DENSE, lambda hidden: hidden).reference_bytes == 0


@pytest.mark.parametrize("name", DISTANCES)
def test_outputs_that_are_not_finite(name):
    broken = DENSE.clone()
    broken[:, 1] = float("nan")
    assert measure(name, DENSE, broken) == math.inf
    with pytest.raises(InputError, match="not finite"):
        measure(name, broken, DENSE)


def test_unknown_distances_are_refused():
    with pytest.raises(InputError, match=r"distance: expected one of js_reverse, .* got 'far'"):
        measure("far", DENSE, PRUNED)
