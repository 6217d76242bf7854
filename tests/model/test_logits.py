"""Logits against Transformers."""

from __future__ import annotations

import json

import pico
import pytest
import torch

from depthprune_runtime import Runtime

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one KV head": {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16},
    "no sharing": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12},
}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def compare(model, folder, dtype="float32", length=40) -> float:
    ids = torch.randint(2, pico.VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids).logits
    return relative_error(Runtime.load(folder, device="cpu", dtype=dtype).logits(ids), theirs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", pico.FAMILIES)
def test_logits_equal_transformers(family, variant, tmp_path):
    changes = dict(VARIANTS[variant])
    if family == "qwen2" and "head_dim" in changes:  # head_dim = hidden_size / heads there
        changes["hidden_size"] = changes["num_attention_heads"] * changes.pop("head_dim")
    model = pico.build_model(family, **changes)
    assert compare(model, pico.save(model, tmp_path)) <= 1e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}}),
        ("llama", {"attention_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 1}),
    ],
)
def test_logits_of_config_options(family, changes, tmp_path):
    model = pico.build_model(family, **changes)
    assert compare(model, pico.save(model, tmp_path), length=100) <= 1e-5


def test_the_window_and_the_rope_scaling_matter(tmp_path):
    """Guards the tests above: these options change the logits they compare."""
    model = pico.build_model("mistral")
    folder = pico.save(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert compare(model, folder) > 1e-2
    model = pico.build_model("llama", rope_parameters=LLAMA3)
    folder = pico.save(model, tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert compare(model, folder, length=100) > 1e-2


def test_old_config_keys_of_rope(tmp_path):
    """Checkpoints written before Transformers 5 have rope_theta and rope_scaling instead of rope_parameters."""
    model = pico.build_model("llama", rope_parameters=LLAMA3)
    folder = pico.save(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    scaling = {k: v for k, v in config.pop("rope_parameters").items() if k != "rope_theta"}
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0, "rope_scaling": scaling}))
    assert compare(model, folder) <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_close_as_transformers(dtype, tmp_path):
    """Against fp32 logits of the same rounded weights, our error is at most 1.5 times Transformers'."""
    model = pico.build_model("llama", dtype=getattr(torch, dtype))
    folder = pico.save(model, tmp_path)
    ids = torch.randint(2, pico.VOCAB_SIZE, (1, 64), generator=torch.Generator().manual_seed(1))
    ours = Runtime.load(folder, device="cpu")
    assert ours.dtype == getattr(torch, dtype)
    with torch.no_grad():
        theirs = model(ids).logits
        reference = model.float()(ids).logits
    assert relative_error(ours.logits(ids), reference) <= 1.5 * relative_error(theirs, reference)


def test_sharded_and_single_files_are_the_same(tmp_path):
    model = pico.build_model("llama")
    single = pico.save(model, tmp_path / "single", tokenizer=False)
    sharded = pico.save(model, tmp_path / "sharded", tokenizer=False, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert compare(model, sharded) <= 1e-5
    assert Runtime.load(single, device="cpu").spec == Runtime.load(sharded, device="cpu").spec


def test_a_converted_dtype_is_the_rounded_model(tmp_path):
    model = pico.build_model("llama")
    folder = pico.save(model, tmp_path)
    runtime = Runtime.load(folder, device="cpu", dtype="bf16")
    expected = model.model.layers[1].mlp.down_proj.weight.to(torch.bfloat16)
    assert runtime.dtype == torch.bfloat16
    ids = list(range(2, 30))
    with torch.no_grad():
        theirs = model.to(torch.bfloat16).float()(torch.tensor([ids])).logits[0]
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight.to(torch.bfloat16), expected)
    assert relative_error(runtime.logits(ids), theirs) < 0.02
