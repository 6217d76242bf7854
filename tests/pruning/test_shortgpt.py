"""ShortGPT against brute force over Transformers' hidden states, and dropped models against Transformers'."""

from __future__ import annotations

import copy
import itertools

import pico
import pytest
import torch

from depthprune_runtime import InputError, Runtime
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.fitting.calibration import CalibrationSet, sample_windows
from depthprune_runtime.pruning.amount import blocks_for_sparsity
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.shortgpt.ranking import plan_shortgpt, removal_order, score_blocks
from depthprune_runtime.pruning.surgery import PrunedCheckpoint

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def scores(pico_file):
    with torch.inference_mode():
        return score_blocks(open_checkpoint(pico_file), WINDOWS, CPU, torch.float32, lambda: None)


def hidden_states_around_blocks(model):
    """Hidden states entering each block and leaving the last, before the final norm."""
    states = []
    hooks = [b.register_forward_pre_hook(lambda _, args: states.append(args[0])) for b in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    with torch.no_grad():
        model(WINDOWS)
    for hook in hooks:
        hook.remove()
    return states


def test_scores_equal_the_formulas(pico_llama, scores):
    states = hidden_states_around_blocks(pico_llama[0])
    for block, (x, y) in enumerate(itertools.pairwise(states)):
        flat_x, flat_y = x.reshape(-1, x.shape[-1]).tolist(), y.reshape(-1, x.shape[-1]).tolist()
        influence = magnitude = 0.0
        for a, b in zip(flat_x, flat_y, strict=True):
            dot = sum(i * j for i, j in zip(a, b, strict=True))
            norm_a, norm_b = sum(i * i for i in a) ** 0.5, sum(i * i for i in b) ** 0.5
            influence += 1 - dot / (norm_a * norm_b)
            magnitude += sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) ** 0.5 / norm_b
        assert scores.block_influence[block] == pytest.approx(influence / len(flat_x), rel=1e-4)
        assert scores.relative_magnitude[block] == pytest.approx(magnitude / len(flat_x), rel=1e-4)


def test_the_batching_does_not_matter(pico_file, scores, monkeypatch):
    from depthprune_runtime.fitting import calibration

    monkeypatch.setattr(calibration, "_BATCH_TOKENS", 1)
    with torch.inference_mode():
        again = score_blocks(open_checkpoint(pico_file), WINDOWS, CPU, torch.float32, lambda: None)
    assert again.block_influence == pytest.approx(scores.block_influence, rel=1e-5)


def test_orders(scores):
    def order(score, protect=True):
        return removal_order(score, scores, 6, protect)

    assert order("sequential") == [0, 1, 2, 3, 4]
    assert order("reverse") == [4, 3, 2, 1, 0]
    assert order("reverse", protect=False) == [5, 4, 3, 2, 1, 0]
    by_influence = order("block-influence", protect=False)
    assert [scores.block_influence[b] for b in by_influence] == sorted(scores.block_influence)
    assert order("block-influence") == [b for b in by_influence if b != 5]
    assert sorted(order("relative-magnitude", protect=False)) == list(range(6))


def plan(pico_file, **options):
    calibration = CalibrationSet(WINDOWS, {"text": "random"})
    with torch.inference_mode():
        return plan_shortgpt(
            open_checkpoint(pico_file), options.pop("blocks", 2), calibration, CPU, torch.float32, **options
        )


def test_the_plan_drops_both_sublayers_of_the_lowest_blocks(pico_file, scores):
    made = plan(pico_file)
    lowest = sorted(range(5), key=lambda b: scores.block_influence[b])[:2]
    assert made.dropped() == {i for b in lowest for i in (2 * b, 2 * b + 1)}
    assert made.settings["scores"]["block-influence"] == pytest.approx(scores.block_influence)
    assert PrunePlan.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("score", "protected"),
    [("block-influence", True), ("relative-magnitude", False), ("sequential", False), ("reverse", False)],
)
def test_the_last_block_is_protected_as_in_the_paper(pico_file, score, protected):
    made = plan(pico_file, score=score)
    assert made.settings["protect_last"] is protected
    assert (5 in made.settings["removal_order"]) is not protected
    assert plan(pico_file, score=score, protect_last=not protected).settings["protect_last"] is not protected


def test_reverse_drops_the_last_block_first(pico_file):
    assert plan(pico_file, blocks=1, score="reverse").dropped() == {10, 11}
    assert plan(pico_file, blocks=1, score="reverse", protect_last=True).dropped() == {8, 9}


@pytest.mark.parametrize("dropped", [[], [0], [5], [2, 3], [0, 2, 4, 5], [1, 2, 3, 4, 5]])
def test_dropped_blocks_equal_a_transformers_model_without_them(pico_llama, pico_file, dropped):
    edits = tuple(Drop(i) for b in dropped for i in (2 * b, 2 * b + 1))
    pruned = PrunedCheckpoint(open_checkpoint(pico_file), PrunePlan("test", "", edits))
    shorter = copy.deepcopy(pico_llama[0])
    shorter.model.layers = torch.nn.ModuleList(m for b, m in enumerate(shorter.model.layers) if b not in dropped)
    for index, layer in enumerate(shorter.model.layers):
        layer.self_attn.layer_idx = index
    with torch.no_grad():
        theirs = shorter(WINDOWS, use_cache=False).logits
    ours = Runtime(pruned, CPU, torch.float32).logits(WINDOWS)
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5
    assert pruned.spec.num_parameters() == sum(p.numel() for p in shorter.parameters())
    assert [s.origin[0] for s in pruned.spec.sublayers[::2]] == [b for b in range(6) if b not in dropped]


def test_dropping_single_sublayers_passes_the_residual_through(pico_llama, pico_file):
    model = copy.deepcopy(pico_llama[0])
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()  # a sub-layer that adds nothing is a dropped one
        model.model.layers[4].mlp.down_proj.weight.zero_()
        theirs = model(WINDOWS).logits
    pruned = PrunedCheckpoint(open_checkpoint(pico_file), PrunePlan("test", "", (Drop(2), Drop(9))))
    runtime = Runtime(pruned, CPU, torch.float32)
    assert float((runtime.logits(WINDOWS) - theirs).norm() / theirs.norm()) <= 1e-5
    assert runtime.spec.uniform() is None
    assert runtime.spec.kv_bytes_per_token(4) == 5 * 2 * 3 * 16 * 4
    ids = WINDOWS[0].tolist()  # and with a cache that has no entry for the dropped attention
    out = runtime.generate([ids], temperature=0, max_new_tokens=1, ignore_eos=True)[0].outputs[0]
    assert out.token_ids[0] == int(theirs[0, -1].argmax())


def test_bad_plans_are_refused(pico_file):
    checkpoint = open_checkpoint(pico_file)
    for edits, message in [
        ((Drop(12),), "has 12 sub-layers"),
        ((Drop(1), Drop(1)), "dropped twice"),
        (tuple(Drop(i) for i in range(12)), "every sub-layer"),
    ]:
        with pytest.raises(InputError, match=message):
            PrunedCheckpoint(checkpoint, PrunePlan("test", "", edits))
    for data, message in [
        ({"edits": [{"kind": "melt", "sublayer": 1}]}, "melt"),
        ({"edits": [{"kind": "drop", "sublayer": "1"}]}, "integer"),
        ({"edits": [], "colour": 1}, "unknown keys"),
        ({"edits": 3}, "list of edits"),
    ]:
        with pytest.raises(InputError, match=message):
            PrunePlan.from_json({"method": "m", "parent_digest": "d", **data})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 6}, "expected 0 to 5"),
        ({"blocks": -1}, "expected 0 to 5"),
        ({"score": "magic"}, "score: expected one of"),
    ],
)
def test_impossible_requests(pico_file, options, message):
    with pytest.raises(InputError, match=message):
        plan(pico_file, **options)


def test_damaged_weights_are_named(tmp_path):
    folder = pico.save(pico.build_model("llama"), tmp_path)
    damaged = pico.save_damaged(folder, tmp_path / "damaged", "sublayers.3.down_proj.weight", float("inf"))
    checkpoint = open_checkpoint(damaged)
    with pytest.raises(InputError, match=r"\(block 1\) holds infinite or NaN weights"), torch.inference_mode():
        plan_shortgpt(checkpoint, 1, CalibrationSet(WINDOWS, {}), CPU, torch.float32)


def test_sparsity_counts_embeddings_and_rounds_up(pico_file):
    spec = open_checkpoint(pico_file).spec
    block = spec.sublayer_parameters(0) + spec.sublayer_parameters(1)
    total = spec.num_parameters()
    assert blocks_for_sparsity(spec, 0.0, 5) == 0
    assert blocks_for_sparsity(spec, 2 * block / total, 5) == 2
    assert blocks_for_sparsity(spec, 2 * block / total + 1e-6, 5) == 3
    for sparsity, message in [(1.0, "below 1"), (-0.1, "below 1"), (float("nan"), "below 1"), (0.95, "the most is")]:
        with pytest.raises(InputError, match=message):
            blocks_for_sparsity(spec, sparsity, 5)


def test_windows_are_drawn_by_seed_without_overlap():
    ids = list(range(1000))
    first = sample_windows(ids, 5, 30, seed=1)
    assert torch.equal(first, sample_windows(ids, 5, 30, seed=1))
    assert not torch.equal(first, sample_windows(ids, 5, 30, seed=2))
    starts = first[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert all(s % 30 == 0 for s in starts)
    assert torch.equal(first, first[:, :1] + torch.arange(30))
    assert sample_windows(ids, 33, 30, seed=0).shape == (33, 30)
    with pytest.raises(InputError, match="34 windows of 30 tokens need 1,020 tokens, got 1,000"):
        sample_windows(ids, 34, 30, seed=0)
