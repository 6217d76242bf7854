"""FinerCut against the plain loop: every candidate is a pruned checkpoint of its own, run from its first token."""

from __future__ import annotations

import json

import pico
import pytest
import torch
from specs import plain_spec

from depthprune_runtime import InputError, Runtime
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.fitting.calibration import CalibrationSet
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.pruning.finercut import candidates as candidates_module
from depthprune_runtime.pruning.finercut import lazy_scores as lazy_module
from depthprune_runtime.pruning.finercut import search as finercut
from depthprune_runtime.pruning.finercut.candidates import CandidateScorer
from depthprune_runtime.pruning.finercut.distances import OutputDistance
from depthprune_runtime.pruning.finercut.goal import Goal, candidates, removable_sublayers
from depthprune_runtime.pruning.finercut.options import DISTANCES
from depthprune_runtime.pruning.finercut.search import plan_finercut, search
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (3, 16), generator=torch.Generator().manual_seed(0))


def run(path, count, **options):
    return search(open_checkpoint(path), WINDOWS, CPU, torch.float32, Goal(count=count), **options)


def order(ranking):
    return [s.sublayer for s in ranking.steps]


# Worked out by hand from the official int(N x / 2) + 1 and int(x N) + 1, N = 2L:
# (blocks of the model, x) -> (first blocks that are no candidates, sub-layers that must be gone before they are)
FRONTS = {(6, 0.4): (3, 5), (16, 0.4): (7, 13), (30, 0.4): (13, 25), (32, 0.4): (13, 26), (6, 0.0): (1, 1)}


def plain_loop(path, count, distance, front_protection, only=None):
    """(ranking, distances, sub-layer evaluations) as the official script goes about it."""
    dense = open_checkpoint(path)
    total = len(dense.spec.sublayers)
    blocks_kept, until = FRONTS[total // 2, front_protection]
    runtime = Runtime(dense, CPU, torch.float32)
    measure = OutputDistance(distance, WINDOWS, runtime.logits(WINDOWS).flatten(0, 1), lambda logits: logits)
    gone, values, evaluations = [], [], 0
    for _ in range(count):
        scores = {}
        for i in range(total):
            protected = i // 2 < blocks_kept and len(gone) < until
            if i in gone or protected or (only == "attention" and i % 2 == 1) or (only == "ffn" and i % 2 == 0):
                continue
            pruned = PrunedCheckpoint(dense, PrunePlan("test", "", tuple(Drop(j) for j in [*gone, i])))
            logits = Runtime(pruned, CPU, torch.float32).logits(WINDOWS)
            scores[i] = measure(logits.flatten(0, 1))
            evaluations += len(pruned.spec.sublayers)
        best = min(scores, key=scores.__getitem__)
        gone.append(best)
        values.append(scores[best])
    return gone, values, evaluations


@pytest.mark.parametrize(
    ("distance", "front_protection", "count"),
    [(d, 0.4, 3) for d in DISTANCES] + [("js_reverse", 0.4, 11), ("angular", 0.0, 6)],
)
def test_the_exact_ranking_is_the_plain_loops(pico_file, distance, front_protection, count):
    ranking = run(pico_file, count, distance=distance, front_protection=front_protection)
    expected, values, evaluations = plain_loop(pico_file, count, distance, front_protection)
    assert order(ranking) == expected
    assert [s.distance for s in ranking.steps] == pytest.approx(values, rel=1e-3, abs=1e-6)
    assert ranking.plain_evaluations == evaluations
    assert all((s.kind, s.block) == (("attention", "ffn")[s.sublayer % 2], s.sublayer // 2) for s in ranking.steps)
    assert [s.step for s in ranking.steps] == list(range(1, count + 1))


@pytest.fixture(scope="module")
def deep_file(tmp_path_factory):
    """16 blocks: deep enough that the shares below are those of a real model."""
    model = pico.build_model("llama", num_hidden_layers=16, initializer_range=0.05)
    return pico.save(model, tmp_path_factory.mktemp("deep"))


def test_the_exact_ranking_is_the_plain_loops_until_the_front_is_free(deep_file):
    """16 blocks: from the fourteenth removal on, the first seven are candidates too."""
    ranking = run(deep_file, 15)
    expected, _, evaluations = plain_loop(deep_file, 15, "js_reverse", 0.4)
    assert order(ranking) == expected
    assert ranking.plain_evaluations == evaluations
    assert min(expected[:13]) >= 14


def test_the_exact_ranking_of_thirty_blocks_is_the_plain_loops(tmp_path):
    """As deep as SmolLM2-135M."""
    model = pico.build_model("llama", num_hidden_layers=30, initializer_range=0.05)
    path = pico.save(model, tmp_path)
    ranking = run(path, 2)
    expected, _, evaluations = plain_loop(path, 2, "js_reverse", 0.4)
    assert order(ranking) == expected
    assert ranking.plain_evaluations == evaluations == 34 * 59 + 33 * 58


@pytest.mark.parametrize("only", ["attention", "ffn"])
@pytest.mark.parametrize(("front_protection", "most"), [(0.0, 6), (0.4, 3)])
def test_only_one_kind_goes_if_so_asked(pico_file, only, front_protection, most):
    """At 0.4 three blocks are free, and five sub-layers would have to go before the others are."""
    ranking = run(pico_file, most, only=only, front_protection=front_protection)
    expected, _, _ = plain_loop(pico_file, most, "js_reverse", front_protection, only)
    assert order(ranking) == expected
    assert {s.kind for s in ranking.steps} == {only}
    with pytest.raises(InputError, match=f"sublayers: expected 0 to {most} of 12, got {most + 1}"):
        run(pico_file, most + 1, only=only, front_protection=front_protection)


@pytest.mark.parametrize("front_protection", [0.0, 0.4])
def test_the_exact_search_costs_about_half_of_the_plain_loop(deep_file, front_protection):
    ranking = run(deep_file, 8, front_protection=front_protection)
    assert ranking.evaluations <= 0.55 * ranking.plain_evaluations
    spec = open_checkpoint(deep_file).spec
    counted = sum(len(candidates(spec, order(ranking)[:k], front_protection)) * (31 - k) for k in range(8))
    assert ranking.plain_evaluations == counted


def test_the_counter_counts_sublayers_over_whole_calibration_sets(pico_file, monkeypatch):
    calls = []
    advance = CandidateScorer._advance
    monkeypatch.setattr(
        CandidateScorer, "_advance", lambda self, i, states: (calls.append(states.shape[0]), advance(self, i, states))
    )
    ranking = run(pico_file, 3)
    assert ranking.evaluations == sum(calls) / WINDOWS.shape[0] - 12  # less the dense pass


def test_the_fast_search_is_cheap_and_near(deep_file):
    exact, fast = run(deep_file, 8), run(deep_file, 8, mode="fast")
    assert fast.evaluations <= 0.2 * fast.plain_evaluations
    assert fast.steps[0].sublayer == exact.steps[0].sublayer
    assert fast.steps[-1].distance <= 1.1 * exact.steps[-1].distance


def test_fast_equals_exact_where_every_candidate_may_be_rescored(pico_file, monkeypatch):
    """With estimates that promise nothing (-inf), the lazy order must find what the full one finds."""
    monkeypatch.setattr(lazy_module, "_SHARE", 1.0)
    scores = finercut.lazy_scores

    def without_memory(scorer, state, allowed, base):
        state.increments.update(dict.fromkeys(state.increments, float("-inf")))
        return scores(scorer, state, allowed, base)

    monkeypatch.setattr(finercut, "lazy_scores", without_memory)
    assert order(run(pico_file, 5, mode="fast")) == order(run(pico_file, 5))


def test_small_sweeps_and_batches_give_the_same(pico_file, monkeypatch):
    expected = run(pico_file, 3)
    monkeypatch.setattr(candidates_module, "_SWEEP_BYTES", 1)
    monkeypatch.setattr(candidates_module, "_BATCH_TOKENS", 1)
    again = run(pico_file, 3)
    assert order(again) == order(expected)
    assert again.evaluations == expected.evaluations


def test_scores_after_removals_in_any_order(pico_file):
    """Prefixes are renewed only where they are stale, wherever the next removal is."""
    decoder = Decoder((checkpoint := open_checkpoint(pico_file)).spec, checkpoint.tensor, CPU, torch.float32)
    with torch.inference_mode():
        lived = CandidateScorer(decoder, WINDOWS, "angular")
        for gone in ([5], [5, 0], [5, 0, 11], [5, 0, 11, 10], [5, 0, 11, 10, 1]):
            lived.remove(gone[-1])
            fresh = CandidateScorer(decoder, WINDOWS, "angular")
            for i in gone:
                fresh.remove(i)
            last = [lived.remaining[-1], lived.remaining[2]]
            assert lived.score(last[1:]) == fresh.score(last[1:])
            assert lived.score(last) == pytest.approx(fresh.score(last), rel=1e-5)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("killed_after", [1, 4])
def test_a_killed_search_resumes_to_the_identical_ranking(pico_file, tmp_path, mode, killed_after):
    state = tmp_path / "search.json"
    whole = run(pico_file, 6, mode=mode)

    def kill(step):
        if step.step == killed_after:
            raise KilledError

    with pytest.raises(KilledError):
        run(pico_file, 6, mode=mode, state_file=state, on_step=kill)
    assert len(json.loads(state.read_text())["steps"]) == killed_after
    done = []
    resumed = run(pico_file, 6, mode=mode, state_file=state, on_step=lambda s: done.append(s.step))
    assert done == list(range(killed_after + 1, 7))
    assert [(s.sublayer, s.distance) for s in resumed.steps] == [(s.sublayer, s.distance) for s in whole.steps]
    assert list(tmp_path.iterdir()) == [state]


def test_a_finished_search_answers_shorter_ones_and_grows_to_longer_ones(pico_file, tmp_path, monkeypatch):
    state = tmp_path / "search.json"
    five = run(pico_file, 5, state_file=state)
    assert order(run(pico_file, 7, state_file=state))[:5] == order(five)
    monkeypatch.setattr(finercut, "Decoder", None)  # nothing is computed again
    assert run(pico_file, 5, state_file=state) == five
    assert len(json.loads(state.read_text())["steps"]) == 7


def test_the_state_of_another_search_is_refused_and_kept(pico_file, tmp_path):
    state = tmp_path / "search.json"
    run(pico_file, 1, state_file=state)
    kept = state.read_bytes()
    with pytest.raises(InputError, match="of another search: expected distance kl; got distance js_reverse"):
        run(pico_file, 1, state_file=state, distance="kl")
    with pytest.raises(InputError, match=r"expected front_protection 0\.2, mode fast; got"):
        run(pico_file, 1, state_file=state, front_protection=0.2, mode="fast")
    with pytest.raises(InputError, match="expected only attention; got only None"):
        run(pico_file, 1, state_file=state, only="attention")
    with pytest.raises(InputError, match="parent_digest"):
        run(pico_file, 1, state_file=state, parent_digest="another")
    with pytest.raises(InputError, match="windows_sha256"):
        search(open_checkpoint(pico_file), WINDOWS[:2], CPU, torch.float32, Goal(count=1), state_file=state)
    assert state.read_bytes() == kept
    for damaged in ("", "{", "[]", '{"key": {}}', kept.decode().replace('"steps"', '"stairs"')):
        state.write_text(damaged)
        with pytest.raises(InputError, match="damaged or of another kind"):
            run(pico_file, 1, state_file=state)
    with pytest.raises(InputError, match="folder"):
        run(pico_file, 1, state_file=tmp_path / "missing" / "search.json")


def test_a_sparsity_is_reached_by_the_fewest_steps_of_the_ranking(pico_file):
    spec = open_checkpoint(pico_file).spec
    long = order(run(pico_file, 8))
    total = spec.num_parameters()
    for count in (1, 3, 6):
        share = sum(spec.sublayer_parameters(i) for i in long[:count]) / total
        for sparsity, expected in [(share, count), (share + 1e-4, count + 1)]:
            goal = Goal(sparsity=sparsity)
            assert order(search(open_checkpoint(pico_file), WINDOWS, CPU, torch.float32, goal)) == long[:expected]


@pytest.mark.parametrize(("blocks", "front_protection"), FRONTS)
def test_front_protection_follows_the_official_rule(blocks, front_protection):
    spec, total = plain_spec(blocks), 2 * blocks
    kept, until = FRONTS[blocks, front_protection]
    behind = list(range(2 * kept, total))
    gone = behind[:until]
    assert candidates(spec, [], front_protection) == behind
    assert candidates(spec, gone[:-1], front_protection) == behind[until - 1 :]
    assert candidates(spec, gone, front_protection) == [i for i in range(total) if i not in gone]


def test_one_sublayer_stays():
    assert candidates(plain_spec(2), [0, 1, 3], 0.0) == []
    assert candidates(plain_spec(2), [0, 1], 0.0, "ffn") == [3]


def test_llama_3_8b_has_the_candidates_of_the_paper():
    """32 blocks, 16 removals: 38 candidates at first, 488 evaluations in all."""
    spec = plain_spec(32)
    first = candidates(spec, [], 0.4)
    assert first == list(range(26, 64))
    assert sum(len(candidates(spec, first[:gone], 0.4)) for gone in range(16)) == 488
    assert len(candidates(spec, [], 0.4, "attention")) == len(candidates(spec, [], 0.4, "ffn")) == 19


@pytest.mark.parametrize(("front_protection", "most"), [(0.0, 11), (0.4, 11), (0.5, 4), (0.8, 2), (0.9, 0), (1.0, 0)])
def test_as_many_go_as_the_protection_allows(pico_file, front_protection, most):
    assert len(removable_sublayers(open_checkpoint(pico_file).spec, front_protection)) == most
    assert len(run(pico_file, most, front_protection=front_protection).steps) == most
    with pytest.raises(InputError, match=f"sublayers: expected 0 to {most} of 12, got {most + 1}"):
        run(pico_file, most + 1, front_protection=front_protection)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_plan_holds_the_ranking_and_cuts_by_it(pico_file, mode):
    calibration = CalibrationSet(WINDOWS, {"text": "random"})
    checkpoint = open_checkpoint(pico_file)
    plan = plan_finercut(
        checkpoint, Goal(count=4), calibration, CPU, torch.float32, mode=mode, parent_digest="d", distance="angular"
    )
    ranking = plan.settings["ranking"]
    assert plan.dropped() == {s["sublayer"] for s in ranking}
    assert {"step", "sublayer", "kind", "block", "distance"} <= set(ranking[0])
    assert plan.settings["calibration"] == {"text": "random"}
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    dense = Runtime(checkpoint, CPU, torch.float32).logits(WINDOWS).flatten(0, 1)
    pruned = Runtime(PrunedCheckpoint(checkpoint, plan), CPU, torch.float32).logits(WINDOWS).flatten(0, 1)
    measured = OutputDistance("angular", WINDOWS, dense, lambda logits: logits)(pruned)
    assert measured == pytest.approx(ranking[-1]["distance"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": Goal(sparsity=0.99)}, r"sparsity: 0\.99 is more than .* the most is 0\."),
        ({"goal": Goal(sparsity=float("nan"))}, "sparsity: expected a number from 0"),
        ({"goal": Goal(count=-1)}, "sublayers: expected 0 to 11"),
        ({"distance": "far"}, "distance: expected one of"),
        ({"only": "heads"}, "only: expected one of attention, ffn, got 'heads'"),
        ({"mode": "slow"}, "mode: expected one of exact, fast, got 'slow'"),
        ({"front_protection": 1.5}, "front_protection: expected a number from 0 to 1, got 1.5"),
        ({"windows": WINDOWS[0]}, r"windows: expected shape \[N, S\]"),
        ({"windows": WINDOWS[:, :1]}, r"windows: expected shape \[N, S\]"),
        ({"windows": WINDOWS + pico.VOCAB_SIZE}, "windows: expected token ids from 0 to 383"),
    ],
)
def test_impossible_requests(pico_file, options, message):
    values = {"windows": WINDOWS, "goal": Goal(count=1), **options}
    with pytest.raises(InputError, match=message):
        search(open_checkpoint(pico_file), values.pop("windows"), CPU, torch.float32, **values)


def test_a_goal_is_one_thing():
    for options in ({}, {"count": 1, "sparsity": 0.1}):
        with pytest.raises(InputError, match="exactly one"):
            Goal(**options)


def test_damaged_weights_are_said(tmp_path):
    folder = pico.save(pico.build_model("llama"), tmp_path)
    damaged = pico.save_damaged(folder, tmp_path / "damaged", "sublayers.3.down_proj.weight", float("inf"))
    with pytest.raises(InputError, match="not finite"):
        run(damaged, 1)
