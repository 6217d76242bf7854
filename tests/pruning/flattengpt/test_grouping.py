"""Merging and narrowing against brute force over Transformers' own modules; grouping against the printed rule."""

from __future__ import annotations

import dataclasses

import pico
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import plain_spec

from depthprune_runtime import FlattenGPTOptions, InputError, Runtime, prune
from depthprune_runtime.checkpoint import Checkpoint, open_checkpoint
from depthprune_runtime.pruning.flattengpt import grouping as flattengpt
from depthprune_runtime.pruning.flattengpt.grouping import flatten_edits, group_blocks, input_similarity
from depthprune_runtime.pruning.plan import Drop, Flatten, Narrow, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint
from depthprune_runtime.spec import AttentionSpec

CPU = torch.device("cpu")
IDS = torch.randint(2, pico.VOCAB_SIZE, (2, 30), generator=torch.Generator().manual_seed(3))


def pruned_logits(checkpoint, *edits):
    pruned = PrunedCheckpoint(checkpoint, PrunePlan("test", "", tuple(edits)))
    return Runtime(pruned, CPU, torch.float32).logits(IDS)


def parallel_logits(model, groups):
    """Transformers' modules, the blocks of each group side by side."""
    core = model.model
    captured = {}

    def capture(index):
        def hook(_, args, kwargs):
            captured[index] = kwargs

        return hook

    hooks = [b.self_attn.register_forward_pre_hook(capture(i), with_kwargs=True) for i, b in enumerate(core.layers)]
    with torch.no_grad():
        model(IDS, use_cache=False)
        for hook in hooks:
            hook.remove()
        x = core.embed_tokens(IDS)
        for group in groups:
            blocks = [(core.layers[i], captured[i]) for i in group]
            x = x + sum(b.self_attn(**{**kw, "hidden_states": b.input_layernorm(x)})[0] for b, kw in blocks)
            x = x + sum(b.mlp(b.post_attention_layernorm(x)) for b, _ in blocks)
        return model.lm_head(core.norm(x))


def close(ours, theirs, bound=1e-5):
    assert float((ours - theirs).norm() / theirs.norm()) <= bound


@pytest.mark.parametrize("groups", [[(0,), (1, 2), (3,)], [(0, 1), (2, 3)], [(0,), (1, 2, 3)]])
@pytest.mark.parametrize("family", pico.FAMILIES)
def test_flattened_blocks_are_the_blocks_side_by_side(family, groups, tmp_path):
    """Folding the gains, GQA order, biases and q/k-norms: all must be right for the outputs to agree."""
    model = pico.build_model(family, num_hidden_layers=4)
    checkpoint = open_checkpoint(pico.save(model, tmp_path, tokenizer=False))
    close(pruned_logits(checkpoint, *flatten_edits(groups)), parallel_logits(model, groups))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_output_biases_add_up(family, tmp_path):
    """No family of `pico` has one by default."""
    model = pico.build_model(family, num_hidden_layers=4, attention_bias=True)
    checkpoint = open_checkpoint(pico.save(model, tmp_path, tokenizer=False))
    assert all(s.o_bias for s in checkpoint.spec.attention_sublayers())
    groups = [(0,), (1, 2, 3)]
    close(pruned_logits(checkpoint, *flatten_edits(groups)), parallel_logits(model, groups))


def test_biases_of_those_ffns_that_have_one_add_up():
    spec = plain_spec(3)
    biased = [dataclasses.replace(s, down_bias=i != 1) if i % 2 else s for i, s in enumerate(spec.sublayers)]

    class Parent(Checkpoint):
        name, dtype, provenance, assets = "parent", torch.float32, {}, {}

        def __init__(self):
            self.spec = dataclasses.replace(spec, sublayers=tuple(biased))

        def tensor(self, name):
            shape = self.spec.tensor_shapes()[name]
            return torch.full(shape, float(name.split(".")[1]))

    merged = PrunedCheckpoint(Parent(), PrunePlan("test", "", (Flatten((0, 1, 2)),)))
    assert set(merged.tensor("sublayers.1.down_proj.bias").tolist()) == {3.0 + 5.0}


def test_flatten_and_drop_in_one_plan(pico_llama, pico_file):
    ours = pruned_logits(open_checkpoint(pico_file), Flatten((1, 2)), Drop(8), Drop(9))
    close(ours, parallel_logits(pico_llama[0], [(0,), (1, 2), (3,), (5,)]))


def test_a_wide_model_generates_with_its_cache(pico_file):
    plan = PrunePlan("test", "", (Flatten((1, 2)), Narrow(6, (0, 2))))
    runtime = Runtime(PrunedCheckpoint(open_checkpoint(pico_file), plan), CPU, torch.float32)
    ids = IDS[0].tolist()
    out = runtime.generate([ids], temperature=0, max_new_tokens=12, ignore_eos=True)[0].outputs[0].token_ids
    row = list(ids)
    for token in out:
        assert token == int(runtime.logits(row)[-1].argmax())
        row.append(token)
    assert [s.num_kv_heads for s in runtime.spec.attention_sublayers()] == [3, 6, 2, 3, 3]
    assert runtime.spec.attention_sublayers()[1].origin == (1, 2)


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_keeping_everything_changes_nothing(family, tmp_path):
    model = pico.build_model(family, num_hidden_layers=3)
    checkpoint = open_checkpoint(pico.save(model, tmp_path, tokenizer=False))
    wide = pruned_logits(checkpoint, Flatten((0, 1)))
    kept = pruned_logits(
        checkpoint, Flatten((0, 1)), Narrow(0, tuple(range(6))), Narrow(1, tuple(range(160))), Narrow(4, (0, 1, 2))
    )
    assert torch.equal(wide, kept)


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_narrowing_removes_whole_units(family, tmp_path):
    """Equal to zeroing the removed units' columns of the output projections in the parent."""
    model = pico.build_model(family, num_hidden_layers=3)
    checkpoint = open_checkpoint(pico.save(model, tmp_path, tokenizer=False))
    groups, channels = (1, 2, 4), tuple(range(0, 160, 3))
    ours = pruned_logits(checkpoint, Flatten((1, 2)), Narrow(2, groups), Narrow(3, channels))
    attention = checkpoint.spec.sublayers[0]
    assert isinstance(attention, AttentionSpec)
    width = attention.num_heads // attention.num_kv_heads * attention.head_dim
    with torch.no_grad():
        for m, block in enumerate(model.model.layers[1:]):
            for g in range(3):
                if m * 3 + g not in groups:
                    block.self_attn.o_proj.weight[:, g * width : (g + 1) * width] = 0
            for c in range(80):
                if m * 80 + c not in channels:
                    block.mlp.down_proj.weight[:, c] = 0
    close(ours, parallel_logits(model, [(0,), (1, 2)]))


def test_what_cannot_merge_is_refused(tmp_path):
    model = pico.build_model("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1)
    checkpoint = open_checkpoint(pico.save(model, tmp_path, tokenizer=False))
    with pytest.raises(InputError, match="blocks \\[0, 1\\] cannot merge, their sliding_window differ"):
        pruned_logits(checkpoint, Flatten((0, 1)))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (lambda: (Flatten((1,)),), "two or more neighbours"),
        (lambda: (Flatten((1, 3)),), "two or more neighbours"),
        (lambda: (Flatten((2, 1)),), "rising"),
        (lambda: (Narrow(0, ()),), "rising"),
        (lambda: (Flatten((1, 2)), Flatten((2, 3))), "both dropped and merged"),
        (lambda: (Flatten((1, 2)), Drop(3)), "both dropped and merged"),
        (lambda: (Flatten((5, 6)),), "the parent has 6 blocks"),
        (lambda: (Narrow(0, (3,)),), "keeps unit 3 of 3"),
        (lambda: (Flatten((1, 2)), Narrow(4, (0,))), "do not begin"),
        (lambda: (Narrow(0, (0,)), Narrow(0, (1,))), "narrowed twice"),
    ],
)
def test_impossible_edits_are_refused(pico_file, edits, message):
    with pytest.raises(InputError, match=message):
        pruned_logits(open_checkpoint(pico_file), *edits())


def test_plans_with_all_edits_survive_json():
    plan = PrunePlan("flattengpt", "d", (Flatten((1, 2)), Narrow(2, (0, 3)), Drop(9)), {"a": 1})
    assert PrunePlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("at_once", [1, 70, 8192])
def test_similarity_equals_the_formula_over_all_windows(pico_llama, pico_file, monkeypatch, at_once):
    """Whether a pass takes one window, two of the three, or all."""
    monkeypatch.setattr(flattengpt, "_TOKENS_AT_ONCE", at_once)
    model = pico_llama[0]
    windows = torch.randint(2, pico.VOCAB_SIZE, (3, 30), generator=torch.Generator().manual_seed(4))
    steps = []
    states = []
    hooks = [b.register_forward_pre_hook(lambda _, args: states.append(args[0])) for b in model.model.layers]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        ours = input_similarity(open_checkpoint(pico_file), windows, CPU, torch.float32, lambda: steps.append(1))
    assert len(steps) == 6
    for i, a in enumerate(states):
        for j, b in enumerate(states):
            expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean()
            assert float(ours[i, j]) == pytest.approx(float(expected), abs=1e-5)


def test_a_longer_calibration_is_used_to_its_end(pico_file):
    """More tokens than one pass takes: the windows behind it count."""
    windows = torch.randint(2, pico.VOCAB_SIZE, (72, 128), generator=torch.Generator().manual_seed(5))
    checkpoint = open_checkpoint(pico_file)
    with torch.inference_mode():
        head, tail, whole = (
            input_similarity(checkpoint, part, CPU, torch.float32) for part in (windows[:64], windows[64:], windows)
        )
    torch.testing.assert_close(whole, (64 * head + 8 * tail) / 72, rtol=1e-6, atol=1e-6)
    assert float((whole - head).abs().max()) > 1e-4


@pytest.mark.parametrize("repair", ["none", "ridge"])
def test_the_plan_says_what_decided_it(pico_file, tmp_path, repair):
    """Groups follow from the recorded similarities; the windows of both passes are told."""
    made = prune(
        pico_file,
        tmp_path / "p",
        blocks=2,
        options=FlattenGPTOptions(grouping="similarity"),
        repair=repair,
        samples=6,
        seq_len=40,
    ).plan
    rows = made.settings["similarity"]
    similarity = torch.zeros(6, 6, dtype=torch.float64)
    for i, row in enumerate(rows):
        similarity[i, i + 1 :] = torch.tensor(row, dtype=torch.float64)
    assert [tuple(g) for g in made.settings["groups"]] == printed_rule(similarity, 2)
    assert made.settings["calibration"]["samples"] == 6
    assert made.settings["narrowing"]["calibration"]["seq_len"] == 40
    assert (made.settings["repair"] is None) == (repair == "none")


def printed_rule(similarity, merges):
    """Delete column l - 1 and row l, as the paper prints it."""
    s = similarity.clone()
    groups = [[i] for i in range(s.shape[0])]
    for _ in range(merges):
        best = max(range(len(groups) - 1), key=lambda k: float(s[k, k + 1]))
        rows = [k for k in range(len(groups)) if k != best + 1]
        columns = [k for k in range(len(groups)) if k != best]
        s = s[rows][:, columns]
        groups[best : best + 2] = [groups[best] + groups[best + 1]]
    return [tuple(g) for g in groups]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6), st.data())
def test_grouping_is_the_printed_rule(blocks, seed, data):
    similarity = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    similarity = (similarity + similarity.T) / 2
    merges = data.draw(st.integers(0, blocks - 1))
    assert group_blocks(similarity, merges) == printed_rule(similarity, merges)


def test_pairs_only_and_its_limit():
    similarity = torch.ones(5, 5, dtype=torch.float64)
    assert group_blocks(similarity, 2, pairs_only=True) == [(0, 1), (2, 3), (4,)]
    with pytest.raises(InputError, match="at most 2 fewer"):
        group_blocks(similarity, 3, pairs_only=True)
    with pytest.raises(InputError, match="at most 4 fewer"):
        group_blocks(similarity, 5)
