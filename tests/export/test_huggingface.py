"""Exported folders, run by Transformers, against our runtime on the file that they were made of."""

from __future__ import annotations

import json

import pruned_pico
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from depthprune_runtime import Runtime, SamplingParams
from depthprune_runtime.checkpoint import open_checkpoint, write_native
from depthprune_runtime.export.export import export_model
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder

CPU = torch.device("cpu")
STOCK = {
    "uniform": "llama",
    "tied": "llama",
    "rope": "llama",
    "window": "mistral",
    "bias": "qwen2",
    "qk_norm": "qwen3",
    "wide_uniform": "llama",
}


def load(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options)
    return model.eval()


def our_logits(path, ids):
    checkpoint = open_checkpoint(path)
    decoder = Decoder(checkpoint.spec, checkpoint.tensor, CPU, torch.float32)
    with torch.inference_mode():
        return decoder.logits(decoder.hidden_states(ids, packed([ids.shape[0]], CPU)))


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", pruned_pico.SHAPES)
def test_transformers_computes_the_same(pruned, tmp_path, name):
    path, folder = pruned(name), tmp_path / "out"
    result = export_model(path, folder, "hf")
    assert result.kind == STOCK.get(name, "depthprune")
    assert result.distance is not None and result.distance < 1e-6
    ids = torch.randint(pruned_pico.pico.VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1))
    wanted = our_logits(path, ids)
    model = load(folder)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with torch.inference_mode():
            assert distance(model(ids[None]).logits[0], wanted) <= 1e-5, attention
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("the quick brown fox jumps over", return_tensors="pt").input_ids
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    ours = Runtime.load(path, device="cpu").generate([prompt[0].tolist()], params)[0].outputs[0].token_ids
    model.generation_config.eos_token_id = None
    for use_cache in (True, False):
        made = model.generate(prompt, do_sample=False, max_new_tokens=32, use_cache=use_cache)
        assert made[0, prompt.shape[1] :].tolist() == list(ours), f"use_cache={use_cache}"


@pytest.mark.parametrize("name", [n for n in pruned_pico.SHAPES if n not in STOCK])
def test_a_folder_of_our_class_is_read_back_as_it_was(pruned, tmp_path, name):
    export_model(pruned(name), tmp_path / "out", "hf", check=False)
    source, found = open_checkpoint(pruned(name)), open_checkpoint(tmp_path / "out")
    assert found.spec == source.spec
    assert found.plan == source.plan
    assert found.dtype == source.dtype
    assert found.checksums() == source.checksums()
    write_native(tmp_path / "again.safetensors", found)
    assert open_checkpoint(tmp_path / "again.safetensors").digest() == source.digest()


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_folder_is_read_back_with_its_weights(pruned, tmp_path, name):
    export_model(pruned(name), tmp_path / "out", "hf", check=False)
    assert not list((tmp_path / "out").glob("*.py"))
    assert open_checkpoint(tmp_path / "out").checksums() == open_checkpoint(pruned(name)).checksums()


@pytest.mark.parametrize("name", ["widths", "wide_qk_norm", "some_windows", "ffns_first"])
def test_what_transformers_saves_again_is_read_back(pruned, tmp_path, name):
    """As a trainer leaves it: its config holds what differs from the widest layer only."""
    export_model(pruned(name), tmp_path / "out", "hf", check=False)
    load(tmp_path / "out").save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    source, found = open_checkpoint(pruned(name)), open_checkpoint(tmp_path / "saved")
    assert found.spec == source.spec
    assert found.plan == source.plan
    assert found.checksums() == source.checksums()


def test_either_name_of_the_cache_is_taken(pruned, tmp_path):
    export_model(pruned("widths"), tmp_path / "out", "hf", check=False)
    model = load(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        whole = model(ids).logits[0, -1]
        for name in ("past_key_values", "cache"):
            first = model(ids[:, :12], use_cache=True)
            field = "cache" if "cache" in first else "past_key_values"
            rest = model(ids[:, 12:], **{name: first[field]}, use_cache=True)
            assert distance(rest.logits[0, -1], whole) <= 1e-5, name
            assert rest[field] is first[field]
            assert rest[field].get_seq_length() == 20


def test_it_can_be_trained(pruned, tmp_path):
    """Loss, gradients with and without checkpointing, and what the layers say on the way."""
    export_model(pruned("wide_qk_norm"), tmp_path / "out", "hf", check=False)
    model = load(tmp_path / "out").train()
    ids = torch.arange(24)[None]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)
    model.eval()
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1


def test_padded_batches_are_masked(pruned, tmp_path):
    export_model(pruned("attention_only"), tmp_path / "out", "hf", check=False)
    model = load(tmp_path / "out")
    ids = torch.arange(10)[None]
    padded = torch.cat([torch.ones(1, 5, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    with torch.inference_mode():
        found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[0, 5:]
        assert distance(found, model(ids).logits[0]) <= 1e-5


def test_config_says_what_differs(pruned, tmp_path):
    export_model(pruned("widths"), tmp_path / "out", "hf", check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = config["per_layer_config"]
    assert [layer["num_key_value_heads"] for layer in layers.values()] == [3, 2, 1, 3, 3, 3]
    assert [layer["num_attention_heads"] for layer in layers.values()] == [9, 6, 3, 9, 9, 9]
    assert [layer["intermediate_sizes"] for layer in layers.values()] == [[80], [80], [48], [80], [], [80]]
    assert config["num_attention_heads"] == 9 and config["head_dim"] == 16
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["bos_token_id"] == 0 and config["eos_token_id"] == 1


def test_shards(pruned, tmp_path):
    path = pruned("widths")
    export_model(path, tmp_path / "out", "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    ids = torch.arange(16)
    with torch.inference_mode():
        assert distance(load(tmp_path / "out")(ids[None]).logits[0], our_logits(path, ids)) <= 1e-5


def test_dtype(pruned, tmp_path):
    result = export_model(pruned("wide"), tmp_path / "out", "hf", dtype="bf16")
    assert result.distance is not None and result.distance < 1e-6
    assert open_checkpoint(tmp_path / "out").dtype == torch.bfloat16
