"""What a source holds is applied as its makers meant, or refused: heads, biases, scales, dtypes, shards."""

from __future__ import annotations

import json
import logging
import shutil

import pico
import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from depthprune_runtime import InputError, Runtime, import_model
from depthprune_runtime.checkpoint import open_checkpoint

IDS = list(range(2, 42))


def error_of(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def transformers_logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([IDS])).logits[0]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    model = pico.build_model("llama", tie_word_embeddings=True)
    return pico.save(model, tmp_path_factory.mktemp("tied"))


@pytest.fixture
def folder(pico_llama, tmp_path):
    return shutil.copytree(pico_llama[1], tmp_path / "model")


def rewrite(folder, change):
    """The folder's tensors after `change`, which takes and gives a dictionary."""
    path = folder / "model.safetensors"
    save_file({k: v.contiguous().clone() for k, v in change(load_file(path)).items()}, path, {"format": "pt"})
    return folder


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "kept_tied", "warned"),
    [
        (lambda t: t | {HEAD: torch.randn_like(t[EMBEDDING])}, False, True),
        (lambda t: t | {HEAD: t[EMBEDDING]}, True, False),
        (lambda t: {k: v for k, v in t.items() if k != EMBEDDING} | {HEAD: t[EMBEDDING]}, True, False),
        (lambda t: t, True, False),
    ],
    ids=["another head", "the same twice", "only the head", "only the embedding"],
)
def test_tied_heads_are_those_of_transformers(tied, tmp_path, change, kept_tied, warned, caplog):
    folder = rewrite(shutil.copytree(tied, tmp_path / "m"), change)
    runtime = Runtime.load(folder, device="cpu")
    assert error_of(runtime.logits(IDS), transformers_logits(folder)) <= 1e-5
    assert runtime.spec.tie_word_embeddings == kept_tied
    assert ("another head" in caplog.text) == warned


def test_base_models_saved_alone(tied, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.model.save_pretrained(tmp_path / "base")
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "base" / "model.safetensors"))
    with torch.no_grad():
        theirs = model(torch.tensor([IDS])).logits[0]
    assert error_of(Runtime.load(tmp_path / "base", device="cpu").logits(IDS), theirs) <= 1e-5
    pico.build_model("llama").model.save_pretrained(tmp_path / "headless")
    with pytest.raises(InputError, match=r"lm_head\.weight is missing .* a base model without its output head"):
        open_checkpoint(tmp_path / "headless")


LAYER = "model.layers.1."


@pytest.mark.parametrize(
    "name",
    [
        LAYER + "mlp.gate_proj.bias",
        LAYER + "self_attn.q_proj.bias",
        LAYER + "self_attn.q_norm.weight",
        LAYER + "self_attn.sinks",
        LAYER + "self_attn.k_proj.k_scale",
        LAYER + "mlp.down_proj.weight_scale",
        LAYER + "mlp.down_proj.weight_scale_inv",
        LAYER + "mlp.down_proj.input_scale",
        LAYER + "mlp.down_proj.qweight",
        LAYER + "mlp.down_proj.weight.absmax",
        LAYER + "mlp.down_proj.lora_A.weight",
        LAYER + "post_feedforward_layernorm.weight",
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_tensors_of_a_layer_that_nobody_applies_are_refused(folder, name):
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(8)})
    with pytest.raises(InputError, match=rf"1 tensors belong to layers of this model, .*: {name}$"):
        open_checkpoint(folder)


def test_other_tensors_are_named_in_one_warning(folder, caplog):
    extra = [f"vision.{i}.weight" for i in range(5)] + ["model.layers.6.mlp.gate_proj.weight"]
    harmless = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.2.self_attn.attn.masked_bias"]
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(8) for name in extra + harmless})
    with caplog.at_level(logging.WARNING):
        open_checkpoint(folder)
    (record,) = caplog.records
    assert (
        "6 tensors are not used: model.layers.6.mlp.gate_proj.weight, vision.0.weight, vision.1.weight and 3 more"
        in (record.getMessage())
    )


@pytest.mark.parametrize("name", ["ffn_gate.bias", "ffn_up.bias", "ffn_down.bias", "attn_q_norm.weight", "attn_q.bias"])
def test_tensors_of_a_gguf_block_that_nobody_applies_are_refused(tmp_path, name):
    extra = {f"blk.1.{name}": torch.ones(80).numpy()}
    path = write_gguf(pico.build_model("llama"), tmp_path / "m.gguf", extra=extra)
    with pytest.raises(InputError, match=rf"1 tensors belong to layers of this model, .*: blk\.1\.{name}$"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool]
)
def test_weights_that_are_codes_are_refused(folder, dtype):
    name = LAYER + "mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(
        InputError, match=rf"{name}: expected weights in BF16, F16, F32, F64, got .*before it was quant"
    ):
        open_checkpoint(folder, torch.float32)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_quantisation_described_beside_the_config_is_refused(folder, name):
    (folder / name).write_text("{}")
    with pytest.raises(InputError, match=rf"quantized weights \({name}\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, bad, tmp_path):
    def damage(tensors):
        tensors[LAYER + "mlp.up_proj.weight"][3, 5] = bad
        return tensors

    rewrite(folder, damage)
    with pytest.raises(InputError, match=rf"{LAYER}mlp\.up_proj\.weight: expected finite weights"):
        import_model(folder, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", ["huggingface", "gguf"])
def test_an_import_that_overflows_writes_nothing(kind, tmp_path):
    model = pico.build_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = -70_000.0
    source = pico.save(model, tmp_path / "m") if kind == "huggingface" else write_gguf(model, tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"(mlp\.up_proj|ffn_up)\.weight: its values overflow float16; use bfloat16"):
        import_model(source, tmp_path / "out.safetensors", dtype="float16")
    assert not (tmp_path / "out.safetensors").exists()
    import_model(source, tmp_path / "out.safetensors", dtype="bfloat16")
    assert (
        float(open_checkpoint(tmp_path / "out.safetensors").tensor("sublayers.3.gate_up_proj.weight").min()) < -69_000
    )


def test_shards_of_one_name_in_several_folders(pico_llama, tmp_path):
    tensors = {k: v.contiguous() for k, v in pico_llama[0].state_dict().items()}
    folder = shutil.copytree(pico_llama[1], tmp_path / "m")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        (folder / f"part{number}").mkdir()
        save_file({n: tensors[n].clone() for n in names}, folder / f"part{number}" / "model.safetensors")
        weight_map |= dict.fromkeys(names, f"part{number}/model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ours, theirs = open_checkpoint(folder), open_checkpoint(pico_llama[1])
    assert ours.checksums() == theirs.checksums()


def test_a_single_file_counts_and_not_an_index_beside_it(pico_llama, tmp_path, caplog):
    """As in Transformers: an index may be left over from before the model was saved as one file."""
    folder = shutil.copytree(pico_llama[1], tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone"}}))
    assert open_checkpoint(folder).checksums() == open_checkpoint(pico_llama[1]).checksums()
    assert "has both model.safetensors and model.safetensors.index.json" in caplog.text


def test_a_generation_config_that_cannot_be_read_is_named(pico_llama, tmp_path):
    folder = shutil.copytree(pico_llama[1], tmp_path / "m")
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").symlink_to("/proc/self/mem")  # a file whose first page cannot be read
    with pytest.raises(InputError, match=r"m/generation_config\.json: cannot be read: Input/output error"):
        dict(open_checkpoint(folder).assets)


@pytest.mark.parametrize("kind", ["two\nlines\r", "\u202eright to left", "nul\x00", "\x1b[31mred"])
def test_what_transformers_says_about_a_config_is_printable(folder, kind, capsys):
    handler = logging.StreamHandler()
    library = logging.getLogger("transformers")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    library.addHandler(handler)
    try:
        with pytest.raises(InputError, match="rope_type"):
            open_checkpoint(folder)
    finally:
        library.removeHandler(handler)
    said = capsys.readouterr().err
    assert "rope_type" in said
    assert all(line.isprintable() for line in said.split("\n"))
    assert not handler.filters
