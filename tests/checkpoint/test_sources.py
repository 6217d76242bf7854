"""Hugging Face folders, hub ids and GGUF files: the same model from each, and one clear line for bad ones."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pico
import pytest
import torch
from gguf_files import write_gguf

from depthprune_runtime import InputError, Runtime
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.evaluation.task_files import find_task
from depthprune_runtime.texts import load_text

IDS = list(range(2, 42))


def runtime_without_tokenizer(path, dtype) -> Runtime:
    """The pico GGUF files carry no vocabulary."""
    runtime = Runtime.load(path, device="cpu", dtype=dtype)
    assert runtime.tokenizer is None
    return runtime


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_logits_equal_transformers(family, tied, tmp_path):
    model = pico.build_model(
        family, tie_word_embeddings=tied, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    runtime = runtime_without_tokenizer(write_gguf(model, tmp_path / "m.gguf"), "float32")
    with torch.no_grad():
        theirs = model(torch.tensor([IDS])).logits[0]
    assert float((runtime.logits(IDS) - theirs).norm() / theirs.norm()) <= 1e-5
    assert runtime.spec.tie_word_embeddings == tied


def test_gguf_rope_factors_are_llama3_scaling(tmp_path):
    from depthprune_runtime.model.rope import inverse_frequencies
    from depthprune_runtime.spec import RopeSpec

    rope = RopeSpec(kind="llama3", factor=8.0, original_max_position_embeddings=64)
    factors = inverse_frequencies(RopeSpec(), 16) / inverse_frequencies(rope, 16)
    parameters = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = pico.build_model("llama", rope_parameters=parameters)
    path = write_gguf(model, tmp_path / "m.gguf", extra={"rope_freqs.weight": factors.float().numpy()})
    runtime = runtime_without_tokenizer(path, "float32")
    with torch.no_grad():
        theirs = model(torch.tensor([IDS])).logits[0]
    assert runtime.spec.rope.kind == "factors"
    assert float((runtime.logits(IDS) - theirs).norm() / theirs.norm()) <= 1e-5


TYPE, FACTOR, OLD = "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear"


@pytest.mark.parametrize(
    ("metadata", "stretch"),
    [
        ({}, 1.0),
        ({TYPE: "none", FACTOR: 4.0}, 1.0),
        ({TYPE: "linear", FACTOR: 4.0}, 4.0),
        ({FACTOR: 4.0}, 4.0),
        ({OLD: 2.0}, 2.0),
        ({FACTOR: 4.0, OLD: 2.0}, 4.0),
        ({TYPE: "linear"}, 1.0),
    ],
)
def test_gguf_positions_are_stretched_as_llama_cpp_does(metadata, stretch, tmp_path):
    """Its frequencies are divided by the factor and by `rope_freqs`, if there are both; a missing type is linear."""
    model = pico.build_model("llama", num_hidden_layers=1)
    rope = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", metadata=metadata)).spec.rope
    assert (rope.kind, rope.factor) == (("default", 1.0) if stretch == 1 else ("linear", stretch))
    factors = np.arange(1, model.config.head_dim // 2 + 1, dtype=np.float32)
    path = write_gguf(model, tmp_path / "m.gguf", extra={"rope_freqs.weight": factors}, metadata=metadata)
    assert open_checkpoint(path).spec.rope.factors == tuple(stretch * factors)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({TYPE: "yarn", FACTOR: 4.0}, r"rope\.scaling\.type: expected 'none' or 'linear', got 'yarn'"),
        ({TYPE: 3}, r"rope\.scaling\.type: expected 'none' or 'linear', got 3"),
        ({FACTOR: 0.0}, r"rope\.scaling\.factor: expected a positive number"),
        ({"llama.rope.scaling.attn_factor": 1.2}, r"rope\.scaling\.attn_factor: values other than 1\.0"),
    ],
)
def test_gguf_positions_of_another_kind_are_refused(metadata, message, tmp_path):
    model = pico.build_model("llama", num_hidden_layers=1)
    factors = np.ones(model.config.head_dim // 2, dtype=np.float32)
    path = write_gguf(model, tmp_path / "m.gguf", extra={"rope_freqs.weight": factors}, metadata=metadata)
    with pytest.raises(InputError, match=rf"m\.gguf: llama\.{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_gguf_is_dequantised_as_the_gguf_package_does(name, tmp_path):
    quantization = gguf.GGMLQuantizationType[name]
    model = pico.build_model(
        "llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=2, intermediate_size=96
    )
    path = write_gguf(model, tmp_path / "m.gguf", quantization)
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, quantization), quantization)
    checkpoint = open_checkpoint(path, torch.float32)
    assert np.array_equal(checkpoint.tensor("sublayers.3.down_proj.weight").numpy(), expected)
    assert open_checkpoint(path).dtype == torch.bfloat16
    assert name in checkpoint.provenance["dequantized_from"]


def test_bad_gguf_files(tmp_path):
    model = pico.build_model("llama")
    path = write_gguf(model, tmp_path / "m.gguf")
    data = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="truncated or damaged"):
        open_checkpoint(tmp_path / "cut.gguf")
    write_gguf(model, tmp_path / "other.gguf", architecture="gemma")
    with pytest.raises(InputError, match=r"expected one of .* got 'gemma'"):
        open_checkpoint(tmp_path / "other.gguf")
    integers = torch.ones(8, dtype=torch.int8).numpy()  # a type that the gguf package cannot dequantise
    path = write_gguf(model, tmp_path / "i8.gguf", extra={"rope_freqs.weight": integers})
    with pytest.raises(InputError, match=r"i8\.gguf: rope_freqs\.weight: cannot dequantise I8"):
        open_checkpoint(path)


def test_a_hub_id_is_downloaded(pico_llama, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda r, **_: asked.append(r) or str(pico_llama[1]))
    checkpoint = open_checkpoint("some-org/some-model")
    assert asked == ["some-org/some-model"]
    assert (checkpoint.name, checkpoint.provenance["source"]) == ("some-org/some-model",) * 2


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="not to be had from the hub: no connection") as error:
        open_checkpoint("some-org/some-model")
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(pico_llama, tmp_path):
    return shutil.copytree(pico_llama[1], tmp_path / "model")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_config(f, model_type="gemma3"), "expected one of .*llama.* got 'gemma3'"),
        (
            lambda f: change_config(f, hidden_act="gelu"),
            "hidden_act: expected 'silu' or 'gelu_pytorch.*, got 'gelu'",
        ),
        (lambda f: change_config(f, mlp_bias=True), "mlp_bias"),
        (lambda f: change_config(f, quantization_config={"bits": 4}), "quantized weights"),
        (lambda f: change_config(f, hidden_size="wide"), "refused by Transformers|hidden_size"),
        (
            lambda f: change_config(f, intermediate_size=81),
            r"gate_proj\.weight: expected shape \[81, 72\]",
        ),
        (lambda f: change_config(f, num_hidden_layers=7), r"model\.layers\.6\..* is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "damaged or not a safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-7]), "truncated"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded"),
        (lambda f: with_index(f, '{"weight_map": {"a": "b"}}'), "shards are missing"),
        (lambda f: with_index(f, "[]"), "not a weight index"),
    ],
)
def test_bad_folders_are_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        Runtime.load(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_missing_paths():
    for name in ("nowhere.safetensors", "/nowhere/at/all", "a b"):
        with pytest.raises(InputError, match="no such file or folder"):
            open_checkpoint(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 300, r"aaa(\.\.\.)?: cannot be read: File name too long"),
        ("~nobody-of-this-name/m", "~nobody-of-this-name/m: cannot be read: Could not determine home directory"),
        (b"m", "expected a path, got b'm'"),
        (None, "expected a path, got None"),
    ],
)
def test_names_that_no_file_can_have(name, message):
    readers = {"model": open_checkpoint}
    if isinstance(name, str):
        readers |= {"text": load_text, "task": lambda name: find_task(name + ".jsonl")}
    for what, read in readers.items():
        with pytest.raises(InputError, match=f"^{what}.*{message if what != 'task' else 'cannot be read'}"):
            read(name)
