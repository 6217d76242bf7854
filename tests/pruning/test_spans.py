"""Span errors against explicit ridge regressions, and the choice against every possibility."""

from __future__ import annotations

import itertools

import pico
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime import InputError, ShortGPTOptions, prune
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.pruning import spans as after_repair
from depthprune_runtime.pruning.spans import choose_spans, span_errors

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (8, 30), generator=torch.Generator().manual_seed(4))


def recorded(model):
    """States entering each block and leaving the last, and psi of each FFN, [N, S, width] float64."""
    states, psi, hooks = [], [], []
    for block in model.model.layers:
        hooks.append(block.register_forward_pre_hook(lambda _, a: states.append(a[0].double())))
        hooks.append(block.mlp.down_proj.register_forward_pre_hook(lambda _, a: psi.append(a[0].double())))
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, a: states.append(a[0].double())))
    with torch.no_grad():
        model(WINDOWS)
    for hook in hooks:
        hook.remove()
    return states, psi


def test_span_errors_are_the_held_out_errors(pico_llama, pico_file):
    states, psi = recorded(pico_llama[0])
    with torch.inference_mode():
        errors = span_errors(
            open_checkpoint(pico_file), WINDOWS, torch.device("cpu"), torch.float32, max_span=3, lam=0.3
        )
    assert set(errors) == {(b, n) for b in range(6) for n in (1, 2, 3) if b + n <= 6}
    for (b, n), error in errors.items():
        change = (states[b + n] - states[b]).flatten(0, 1)
        weight = 1 / states[b].flatten(0, 1).pow(2).sum(-1, keepdim=True)
        total = 0.0
        for fit, held in ((slice(0, 120), slice(120, 240)), (slice(120, 240), slice(0, 120))):
            left = change[held]
            if b > 0:
                z = psi[b - 1].flatten(0, 1)
                gram = z[fit].T @ (weight[fit] * z[fit])
                gram = gram + 0.3 * gram.diagonal().mean() * torch.eye(80)
                left = left - z[held] @ torch.linalg.solve(gram, z[fit].T @ (weight[fit] * change[fit]))
            total += float((weight[held] * left.pow(2)).sum())
        assert error == pytest.approx(total / 240, rel=1e-3)


def test_random_directions_keep_lengths_on_average():
    """Orthonormal, scaled by sqrt(C / k), and the same each time."""
    assert after_repair._directions(128, CPU) is None
    found = after_repair._directions(200, CPU)
    assert found.shape == (200, 128)
    assert torch.equal(found, after_repair._directions(200, CPU))
    torch.testing.assert_close(found.T @ found, torch.eye(128) * 200 / 128, atol=1e-5, rtol=0)
    vectors = torch.randn(4000, 200, generator=torch.Generator().manual_seed(1))
    assert float((vectors @ found).square().sum() / vectors.square().sum()) == pytest.approx(1.0, abs=0.01)


def test_a_wide_model_is_scored_along_them(tmp_path):
    """Each error is that of the regressions along the directions, and near that of all of the stream."""
    model = pico.build_model("llama", num_hidden_layers=3, hidden_size=198)
    path = pico.save(model, tmp_path, tokenizer=False)
    states, psi = recorded(model)

    def by_hand(b, n, directions):
        change = (states[b + n] - states[b]).flatten(0, 1) @ directions
        weight = 1 / states[b].flatten(0, 1).pow(2).sum(-1, keepdim=True)
        total = 0.0
        for fit, held in ((slice(0, 120), slice(120, 240)), (slice(120, 240), slice(0, 120))):
            left = change[held]
            if b > 0:
                z = psi[b - 1].flatten(0, 1)
                root = weight[fit].sqrt() * z[fit]
                ridge = (0.3 * root.square().sum(0).mean()) ** 0.5 * torch.eye(80, dtype=torch.float64)
                goal = torch.cat((weight[fit].sqrt() * change[fit], torch.zeros(80, change.shape[1])))
                left = left - z[held] @ torch.linalg.lstsq(torch.cat((root, ridge)), goal).solution
            total += float((weight[held] * left.pow(2)).sum())
        return total / 240

    with torch.inference_mode():
        errors = span_errors(open_checkpoint(path), WINDOWS, CPU, torch.float32, max_span=2, lam=0.3)
    directions = after_repair._directions(198, CPU).double()
    for (b, n), error in errors.items():
        assert error == pytest.approx(by_hand(b, n, directions), rel=1e-3)
        assert error == pytest.approx(by_hand(b, n, torch.eye(198, dtype=torch.float64)), rel=0.15)


def cost(errors, dropped):
    """Sum over the maximal runs of `dropped`; None if one is longer than any known span."""
    total = 0.0
    for _, run in itertools.groupby(enumerate(sorted(dropped)), key=lambda p: p[1] - p[0]):
        blocks = [b for _, b in run]
        if (blocks[0], len(blocks)) not in errors:
            return None
        total += errors[blocks[0], len(blocks)]
    return total


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10**6), st.booleans(), st.integers(1, 4), st.data())
def test_the_choice_is_the_best_of_all(blocks, seed, protect, max_span, data):
    generator = torch.Generator().manual_seed(seed)
    errors = {
        (b, n): float(torch.rand(1, generator=generator))
        for b in range(blocks)
        for n in range(1, max_span + 1)
        if b + n <= blocks
    }
    free = blocks - int(protect)
    drop = data.draw(st.integers(0, free))
    possible = [c for d in itertools.combinations(range(free), drop) if (c := cost(errors, d)) is not None]
    chosen = choose_spans(errors, blocks, drop, protect)
    dropped = [b for first, n in chosen for b in range(first, first + n)]
    if not possible:
        assert dropped == [] or drop == 0
        return
    assert len(set(dropped)) == len(dropped) == drop
    assert cost(errors, dropped) == pytest.approx(min(possible))


def test_it_prunes(pico_file, tmp_path):
    small = {"samples": 6, "seq_len": 40}
    result = prune(pico_file, tmp_path / "p", blocks=2, options=ShortGPTOptions("after-repair"), **small)
    settings = result.plan.settings
    errors = {(first, n): error for first, n, error in settings["span_errors"]}
    chosen = [b for first, n in choose_spans(errors, 6, 2, True) for b in range(first, first + n)]
    assert result.plan.dropped() == {i for b in chosen for i in (2 * b, 2 * b + 1)}
    errors = {(b, n): e for b, n, e in settings["span_errors"]}
    best = min(c for d in itertools.combinations(range(5), 2) if (c := cost(errors, d)) is not None)
    assert cost(errors, chosen) == pytest.approx(best)
    with pytest.raises(InputError, match="blocks: expected 0 to 5"):
        prune(pico_file, tmp_path / "q", blocks=6, options=ShortGPTOptions("after-repair"), **small)
