"""Mamba and RWKV: scores against brute force, written folders against the parent with blocks skipped by hooks."""

from __future__ import annotations

import contextlib
import itertools
import json

import pico
import pytest
import torch
from other_models import BLOCKS, WINDOWS, build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from depthprune_runtime import InputError
from depthprune_runtime.fitting.calibration import calibration_set
from depthprune_runtime.pruning.recurrent import blocks as other_blocks
from depthprune_runtime.pruning.recurrent.blocks import OTHER_FAMILIES, block_parameters, drop_blocks, score_model
from depthprune_runtime.pruning.recurrent.folder import PLAN_FILE, is_recurrent
from depthprune_runtime.pruning.recurrent.prune import prune_other

families = pytest.mark.parametrize("family", list(OTHER_FAMILIES))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def first_input(model, block, hidden):
    """RWKV's first block carries the norm of the embeddings."""
    norm = getattr(block, "pre_ln", None) if block is other_blocks.block_list(model)[0] else None
    return hidden if norm is None else norm(hidden)


@contextlib.contextmanager
def skipped(model, dropped):
    """`model` with these blocks replaced by the identity on the residual stream."""

    def skip(block, inputs, output):
        hidden = first_input(model, block, inputs[0])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = other_blocks.block_list(model)
    handles = [blocks[i].register_forward_hook(skip) for i in dropped]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def logits(model):
    return model(WINDOWS, use_cache=False).logits


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def check_generation(model):
    """Greedy decoding with the cache gives the tokens that it gives without."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    prompt = WINDOWS[:1, :7]  # one row: Transformers' RWKV mixes rows up when it decodes several with a state
    cached, plain = (model.generate(prompt, use_cache=c, **options) for c in (True, False))
    assert cached.shape == (1, 15)
    assert cached.tolist() == plain.tolist()


def test_what_is_recurrent(tmp_path):
    def found(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return is_recurrent(tmp_path)

    assert not is_recurrent(tmp_path)
    assert all(found({"model_type": f}) for f in ("mamba", "mamba2", "falcon_mamba", "rwkv"))
    assert not any(found(c) for c in ({}, {"model_type": "llama"}, {"model_type": ["mamba"]}, []))
    assert not any(map(is_recurrent, ("nowhere", "a\0b", "owner/model")))


@families
def test_scores_equal_the_formulas(parents, family):
    model = load(parents[family])
    blocks, states = other_blocks.block_list(model), []
    final = getattr(model.base_model, "ln_out", None) or model.base_model.norm_f
    handles = [
        m.register_forward_pre_hook(lambda m, args: states.append(first_input(model, m, args[0])))
        for m in (*blocks, final)
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    steps = []
    scores = score_model(model, WINDOWS, lambda: steps.append(1))
    assert len(steps) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for i, (x, y) in enumerate(itertools.pairwise(states)):
        rows = list(zip(x.double().flatten(0, 1), y.double().flatten(0, 1), strict=True))
        influence = sum(1 - float(a @ b) / float(a.norm() * b.norm()) for a, b in rows) / len(rows)
        magnitude = sum(float((b - a).norm() / b.norm()) for a, b in rows) / len(rows)
        assert influence > 1e-3
        assert scores.block_influence[i] == pytest.approx(influence, rel=1e-4)
        assert scores.relative_magnitude[i] == pytest.approx(magnitude, rel=1e-4)


@families
def test_the_batching_does_not_matter(parents, family, monkeypatch):
    whole = score_model(load(parents[family]), WINDOWS)
    monkeypatch.setattr(other_blocks, "_BATCH_TOKENS", 1)
    steps = []
    one_by_one = score_model(load(parents[family]), WINDOWS, lambda: steps.append(1))
    assert len(steps) == len(WINDOWS)
    assert one_by_one.block_influence == pytest.approx(whole.block_influence, rel=1e-4)


@families
@pytest.mark.parametrize(
    ("score", "options", "dropped"),
    [
        ("sequential", {"blocks": 2}, [0, 1]),
        ("reverse", {"blocks": 2, "protect_last": False}, [3, 4]),
        ("block-influence", {"blocks": 2}, None),
        ("reverse", {"blocks": 0}, []),
    ],
)
def test_the_folder_equals_the_parent_with_blocks_skipped(parents, tmp_path, family, score, options, dropped):
    result = prune_other(parents[family], tmp_path / "out", calibration=WINDOWS, score=score, device="cpu", **options)
    if dropped is None:
        influence = result.scores.block_influence
        dropped = sorted(sorted(range(BLOCKS - 1), key=lambda b: influence[b])[:2])
    assert result.dropped == dropped
    parent, ours = load(parents[family]), load(tmp_path / "out")
    dense = logits(parent)
    with skipped(parent, dropped):
        theirs = logits(parent)
    assert not dropped or distance(dense, theirs) > 1e-2
    assert distance(logits(ours), theirs) <= 1e-5
    check_generation(ours)
    assert ours.config.num_hidden_layers == len(other_blocks.block_list(ours)) == BLOCKS - len(dropped)
    assert len(getattr(ours.config, "layer_types", range(ours.config.num_hidden_layers))) == BLOCKS - len(dropped)
    assert getattr(ours.config, "n_layer", BLOCKS - len(dropped)) == BLOCKS - len(dropped)
    assert result.parent_parameters == sum(p.numel() for p in parent.parameters())
    assert result.parameters == sum(p.numel() for p in ours.parameters())


@families
def test_a_model_in_memory_is_fit_to_run_after_the_drop(parents, family):
    model, parent = load(parents[family]), load(parents[family])
    drop_blocks(model, [0, 2, 3])
    with skipped(parent, [0, 2, 3]):
        assert distance(logits(model), logits(parent)) <= 1e-5
    check_generation(model)


@families
def test_kept_weights_are_the_parents_to_the_bit(tmp_path, family):
    changes = {"rescale_every": 1} if family == "rwkv" else {}
    model = build(family, **changes).to(torch.bfloat16)
    parent = pico.save(model, tmp_path / "parent")
    result = prune_other(parent, tmp_path / "out", calibration=WINDOWS, blocks=3, device="cpu")
    kept = [b for b in range(BLOCKS) if b not in result.dropped]
    before, after = load_file(parent / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    prefix = f"{model.base_model_prefix}.{OTHER_FAMILIES[family].blocks}."
    for name, tensor in after.items():
        old = name
        if name.startswith(prefix):
            index, rest = name.removeprefix(prefix).split(".", 1)
            old = f"{prefix}{0 if rest.startswith('pre_ln') else kept[int(index)]}.{rest}"
        assert torch.equal(tensor.to(before[old].dtype), before[old]), name


def test_rescaling_changes_neither_scores_nor_outputs(tmp_path):
    """Transformers halves RWKV's residual stream every few blocks; only the norms' epsilon can tell."""
    plain = score_model(build("rwkv"), WINDOWS)
    halved = score_model(build("rwkv", rescale_every=2), WINDOWS)
    assert halved.block_influence == pytest.approx(plain.block_influence, rel=1e-3)
    assert halved.relative_magnitude == pytest.approx(plain.relative_magnitude, rel=1e-3)
    parent = pico.save(build("rwkv", rescale_every=2), tmp_path / "parent")
    result = prune_other(parent, tmp_path / "out", calibration=WINDOWS, blocks=2, device="cpu")
    model = load(parent)
    with skipped(model, result.dropped):
        assert distance(logits(load(tmp_path / "out")), logits(model)) <= 1e-3


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_sparsity_takes_the_fewest_blocks(parents, tmp_path, family):
    model = load(parents[family])
    share = block_parameters(model) / sum(p.numel() for p in model.parameters())
    for name, sparsity, number in [("a", 2 * share, 2), ("b", 2 * share + 1e-4, 3), ("c", 0.0, 0)]:
        out = tmp_path / name
        result = prune_other(parents[family], out, calibration=WINDOWS, sparsity=sparsity, score="reverse")
        assert len(result.dropped) == number
        assert result.sparsity == pytest.approx(number * share)
        assert result.sparsity >= sparsity - 1e-9
    with pytest.raises(InputError, match=r"0\.999 would take .* blocks, only [34] of 5 can go; the most is"):
        prune_other(parents[family], tmp_path / "d", calibration=WINDOWS, sparsity=0.999)


def test_what_lies_beside_the_weights(parents, tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder is taken
    seen = []

    def calibration(encode):
        seen.append(encode("the quick brown fox"))
        return calibration_set("words", "the quick brown fox jumps over the lazy dog " * 40, encode, 4, 16, 3)

    result = prune_other(parents["mamba2"], tmp_path / "out", calibration=calibration, blocks=1, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert seen == [tokenizer.encode("the quick brown fox", add_special_tokens=False)]
    assert tokenizer.chat_template == pico.CHAT_TEMPLATE
    plan = json.loads((tmp_path / "out" / PLAN_FILE).read_text())
    assert plan["dropped_blocks"] == result.dropped
    assert plan["settings"]["removal_order"] == result.order
    assert sorted(result.order) == [0, 1, 2, 3]
    assert plan["settings"]["scores"]["block-influence"] == result.scores.block_influence
    assert plan["settings"]["calibration"]["seed"] == 3
    assert (plan["parent_parameters"], plan["parameters"]) == (result.parent_parameters, result.parameters)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match="already pruned"):
        prune_other(tmp_path / "out", tmp_path / "again", calibration=WINDOWS, blocks=1)


def test_the_dtype_of_the_output(parents, tmp_path):
    prune_other(parents["mamba"], tmp_path / "out", calibration=WINDOWS, blocks=1, dtype="bf16", device="cpu")
    assert load(tmp_path / "out").dtype == torch.bfloat16
