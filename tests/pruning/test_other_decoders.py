"""Mamba and RWKV: scores against brute force, written folders against the parent with blocks skipped by hooks."""

from __future__ import annotations

import contextlib
import itertools
import json

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from depthprune_runtime import InputError
from depthprune_runtime.pruning import other_blocks, other_folder
from depthprune_runtime.pruning.calibration import calibration_set
from depthprune_runtime.pruning.other_blocks import OTHER_FAMILIES, block_parameters, drop_blocks, score_model
from depthprune_runtime.pruning.other_decoders import is_other_decoder, prune_other
from depthprune_runtime.pruning.other_folder import PLAN_FILE

BLOCKS = 5
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(0))
SIZES = {
    "mamba": {"state_size": 4, "n_layer": BLOCKS},  # converted checkpoints carry n_layer beside num_hidden_layers
    "falcon_mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 8},
    "rwkv": {"intermediate_size": 40, "rescale_every": 0, "context_length": 64},
}


def build(family, **changes):
    """A random model whose blocks all matter."""
    values = {
        "vocab_size": pico.VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": BLOCKS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(values | SIZES[family] | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ("ln" in name and name.endswith("weight")):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 2 and "A_log" not in name:
                parameter.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """family -> folder; build or load a model anew where it is run, for RWKV rescales its weights then."""
    return {f: pico.save(build(f), tmp_path_factory.mktemp(f)) for f in OTHER_FAMILIES}


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


def test_dispatch():
    assert all(is_other_decoder({"model_type": f}) for f in ("mamba", "mamba2", "falcon_mamba", "rwkv"))
    assert not any(is_other_decoder(c) for c in ({}, {"model_type": "llama"}, {"model_type": ["mamba"]}))


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


@pytest.mark.parametrize(("error", "expected"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, InputError)])
def test_nothing_is_left_after_an_interrupt(parents, tmp_path, monkeypatch, error, expected):
    def stop(*_):
        assert any(tmp_path.glob(".out.*/model.safetensors"))
        raise error("stopped")

    monkeypatch.setattr(other_folder.shutil, "copyfile", stop)
    with pytest.raises(expected):
        prune_other(parents["mamba"], tmp_path / "out", calibration=WINDOWS, blocks=1, score="reverse")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_fills_up_meanwhile_is_not_overwritten(parents, tmp_path, monkeypatch):
    mine = tmp_path / "out" / "mine"
    monkeypatch.setattr(other_folder.os, "fsync", lambda _: mine.mkdir(parents=True, exist_ok=True))
    with pytest.raises(InputError, match="cannot be written"):
        prune_other(parents["mamba"], tmp_path / "out", calibration=WINDOWS, blocks=1, score="reverse")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "out", mine]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("mamba", {"blocks": 5}, "blocks: expected 0 to 4 of 5, got 5"),
        ("rwkv", {"blocks": 4}, "blocks: expected 0 to 3 of 5, got 4"),  # Transformers loads no RWKV of one block
        ("mamba", {"blocks": -1}, "got -1"),
        ("mamba", {"blocks": True}, "got True"),
        ("mamba", {}, "exactly one"),
        ("mamba", {"blocks": 1, "sparsity": 0.1}, "exactly one"),
        ("mamba", {"sparsity": 1.0}, "below 1"),
        ("mamba", {"sparsity": float("nan")}, "below 1"),
        ("mamba", {"blocks": 1, "score": "magic"}, "score: expected one of"),
        ("mamba", {"blocks": 1, "calibration": WINDOWS[0]}, "windows"),
        ("mamba", {"blocks": 1, "calibration": WINDOWS.int()}, "windows"),
        ("mamba", {"blocks": 1, "calibration": WINDOWS[:0]}, "none empty"),
        ("mamba", {"blocks": 1, "calibration": WINDOWS + 300}, "token ids from 0 to below 384"),
        ("rwkv", {"blocks": 1, "calibration": WINDOWS.repeat(1, 4)}, "context of 64, got 80"),
    ],
)
def test_impossible_requests(parents, tmp_path, family, options, message):
    with pytest.raises(InputError, match=message):
        prune_other(parents[family], tmp_path / "out", **({"calibration": WINDOWS} | options))
    assert not list(tmp_path.iterdir())


def test_bad_outputs(parents, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for name, message in [
        ("full", "one that holds files"),
        ("full/file", "a file of that name"),
        ("none/out", "create it first"),
    ]:
        with pytest.raises(InputError, match=message):
            prune_other(parents["mamba"], tmp_path / name, calibration=WINDOWS, blocks=1)
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "file"]


def test_bad_models(tmp_path):
    def refused(message, blocks=1):
        with pytest.raises(InputError, match=message) as caught:
            prune_other(tmp_path, tmp_path / "out", calibration=WINDOWS, blocks=blocks, device="cpu")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("no config.json")
    (tmp_path / "config.json").write_text("{")
    refused("not JSON")
    (tmp_path / "config.json").write_text("[]")
    refused("expected a JSON object, got list")
    for stored in ({"model_type": "llama"}, {"model_type": "rwkv5"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(stored))
        refused("model_type: expected one of mamba, falcon_mamba, mamba2, rwkv, got")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "quantization_config": {"bits": 4}}))
    refused("quantized")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    refused("no weights")

    pico.save(build("mamba"), tmp_path, tokenizer=False)
    config = (tmp_path / "config.json").read_text()
    for changes, message in [
        ({"hidden_size": "wide"}, "refused by Transformers"),
        ({"num_hidden_layers": 10**9}, r"expected at most 5, .* got 1000000000: backbone\.layers\.5\.\* is missing"),
        ({"n_layer": 10**9}, "n_layer: expected at most 5"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**json.loads(config), **changes}))
        refused(message)
    (tmp_path / "config.json").write_text(config)
    weights = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.1.mixer.D"
    for changed, message in [
        ({k: v for k, v in weights.items() if k != name}, f"1 weights are missing, such as {name}"),
        (weights | {"backbone.layers.5.mixer.D": weights[name].clone()}, "1 weights that its config does not know"),
        (weights | {name: weights[name][:-1].clone()}, "refused by Transformers"),
        (weights | {name: weights[name] * float("nan")}, f"{name}: expected finite weights"),
        (weights | {name: weights[name].to(torch.float8_e4m3fn)}, f"{name}: expected weights in bf16.* got F8_E4M3"),
    ]:
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        refused(message)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    refused("truncated or not a safetensors file")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for tokenizer, message in [(None, "carries no tokenizer"), ("{", "its tokenizer cannot be read")]:
        if tokenizer is not None:
            (tmp_path / "tokenizer.json").write_text(tokenizer)
        with pytest.raises(InputError, match=message):
            prune_other(tmp_path, tmp_path / "out", calibration=lambda encode: encode("a"), blocks=1)
