"""Which units stay and which blocks merge if a repair follows, against brute force over the repaired loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime import InputError
from depthprune_runtime.fitting import linalg, states
from depthprune_runtime.fitting import projection as repair
from depthprune_runtime.fitting.projection import Moments
from depthprune_runtime.pruning.flattengpt import units as narrowing
from depthprune_runtime.pruning.flattengpt.elimination import choose_after_repair
from depthprune_runtime.pruning.flattengpt.grouping import groups_after_repair
from depthprune_runtime.pruning.flattengpt.merging import unit_columns
from depthprune_runtime.pruning.flattengpt.method import FlattenGPT
from depthprune_runtime.pruning.flattengpt.options import FlattenGPTOptions
from depthprune_runtime.pruning.shortgpt.method import ShortGPT
from depthprune_runtime.pruning.shortgpt.options import ShortGPTOptions
from depthprune_runtime.spec import AttentionSpec, FFNSpec

LAM = 0.05
ATTENTION = AttentionSpec(num_heads=12, num_kv_heads=6, head_dim=4, origin=(1, 2))  # units of 8 columns
FFN = FFNSpec(intermediate_size=40, origin=(1, 2))


def problem(width, seed, hidden=5):
    """Inner activations with correlated columns, a target and a projection; the moments of the first two."""
    g = torch.Generator().manual_seed(seed)
    inner = torch.randn(300, width, generator=g) @ torch.randn(width, width, generator=g)
    target = inner @ torch.randn(width, hidden, generator=g) * 0.3 + torch.randn(300, hidden, generator=g)
    return Moments(inner.T @ inner / 300, inner.T @ target / 300), torch.randn(hidden, width, generator=g)


def loss(moments, initial, spec, units):
    """Least loss over projections of these units only: what `repair.solve` reaches, the ridge of the whole."""
    columns = unit_columns(spec, units)
    ridge = LAM * float(moments.gram.diagonal().double().mean())
    system = moments.gram.double()[columns][:, columns] + ridge * torch.eye(len(columns), dtype=torch.float64)
    right = moments.cross.double()[columns] + ridge * initial.T.double()[columns]
    return -float((right * torch.linalg.solve(system, right)).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_kv_groups_go_one_by_one_by_the_repaired_loss(seed, count):
    moments, initial = problem(48, seed)
    left = tuple(range(6))
    while len(left) > count:
        smaller = itertools.combinations(left, len(left) - 1)
        left = min(smaller, key=lambda units: loss(moments, initial, ATTENTION, units))
    assert choose_after_repair(moments, initial, ATTENTION, count, LAM) == left


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_the_first_channel_to_go_adds_the_least_loss(seed):
    moments, initial = problem(40, seed)
    every = tuple(range(40))
    best = min(itertools.combinations(every, 39), key=lambda units: loss(moments, initial, FFN, units))
    assert choose_after_repair(moments, initial, FFN, 39, LAM) == best
    assert choose_after_repair(moments, initial, FFN, 40, LAM) == every


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_channels_left_mend_better_than_those_of_the_largest_leverage(seed):
    moments, initial = problem(40, seed)
    ours = choose_after_repair(moments, initial, FFN, 20, LAM)
    papers = narrowing.choose_units(moments.gram, initial, FFN, 20, 10.0)
    assert len(ours) == 20
    assert loss(moments, initial, FFN, ours) < loss(moments, initial, FFN, papers)


def one_by_one(moments, initial, count):
    """Backward elimination of channels with the whole system solved anew after each."""
    ridge = LAM * float(moments.gram.diagonal().double().mean())
    system = moments.gram.double() + ridge * torch.eye(len(moments.gram), dtype=torch.float64)
    right = moments.cross.double() + ridge * initial.T.double()
    left = torch.arange(len(system))
    while len(left) > count:
        inverse = torch.linalg.inv(system[left][:, left])
        costs = (inverse @ right[left]).pow(2).sum(1) / inverse.diagonal()
        left = left[torch.arange(len(left)) != costs.argmin()]
    return tuple(left.tolist())


def test_parts_of_several_channels_come_near_to_one_by_one():
    """Members of a part ignore one another: the loss may rise a little."""
    spec, (moments, initial) = FFNSpec(intermediate_size=160, origin=(0, 1)), problem(160, 7)
    whole = loss(moments, initial, spec, tuple(range(160)))
    ours = loss(moments, initial, spec, choose_after_repair(moments, initial, spec, 80, LAM)) - whole
    exact = loss(moments, initial, spec, one_by_one(moments, initial, 80)) - whole
    assert ours <= 1.1 * exact


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 7), st.integers(0, 10**6), st.data())
def test_grouping_finds_the_least_error(blocks, seed, data):
    merges = data.draw(st.integers(0, blocks - 2))
    values = torch.rand(blocks, blocks + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    errors = {(f, n): values[f][n] for f in range(blocks) for n in range(1, blocks - f + 1)}

    def cost(cuts):
        bounds = [0, *cuts, blocks]
        groups = [tuple(range(a, b)) for a, b in itertools.pairwise(bounds)]
        return sum(errors[g[1], len(g) - 1] for g in groups if len(g) > 1), groups

    # the last block stays alone: a cut before it
    every = [cost((*cuts, blocks - 1)) for cuts in itertools.combinations(range(1, blocks - 1), blocks - merges - 2)]
    best = min(every)
    assert groups_after_repair(errors, blocks, merges) == best[1]


def test_pairs_only_and_impossible_groupings():
    errors = {(f, n): 1.0 / n + f for f in range(6) for n in range(1, 6 - f + 1)}
    pairs = groups_after_repair(errors, 6, 2, pairs_only=True)
    assert sorted(map(len, pairs)) == [1, 1, 2, 2]
    with pytest.raises(InputError, match="3 of 6 cannot merge \\(pairs of neighbours only\\)"):
        groups_after_repair(errors, 6, 3, pairs_only=True)


def test_auto_follows_the_repair():
    shortgpt, flattengpt = ShortGPT().resolved, FlattenGPT().resolved
    assert shortgpt(ShortGPTOptions(), True).score == "after-repair"
    assert shortgpt(ShortGPTOptions(), False).score == "block-influence"
    assert shortgpt(ShortGPTOptions(score="reverse"), True) == ShortGPTOptions("reverse", protect_last=False)
    assert shortgpt(ShortGPTOptions(), True).protect_last is shortgpt(ShortGPTOptions(), False).protect_last is True
    assert shortgpt(ShortGPTOptions(protect_last=False), True).protect_last is False
    paper = flattengpt(FlattenGPTOptions(), False)
    assert (paper.grouping, paper.selection) == ("similarity", "importance")
    ours = flattengpt(FlattenGPTOptions(), True)
    assert (ours.grouping, ours.selection) == ("after-repair", "after-repair")
    with pytest.raises(InputError, match="selection: after-repair needs a repair"):
        flattengpt(FlattenGPTOptions(selection="after-repair"), False)


def test_scratch_files_change_nothing(monkeypatch):
    """Solving and choosing in mapped files is the same arithmetic."""
    moments, initial = problem(40, 3)
    columns = torch.arange(0, 40, 2)

    def results():
        kept = choose_after_repair(moments, initial, FFN, 20, LAM)
        return (
            kept,
            repair.solve(moments, initial[:, columns], columns, LAM),
            narrowing.leverage_scores(moments.gram, LAM),
        )

    kept, solved, scores = results()
    monkeypatch.setattr(states, "MEMORY_LIMIT", 0)
    assert linalg.scratch_limit() == 0
    again = results()
    assert again[0] == kept
    assert torch.equal(again[1], solved)
    assert torch.equal(again[2], scores)
