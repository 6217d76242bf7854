"""Folders and files of ours in other formats, imported again: whole, trained, hand-made and damaged."""

from __future__ import annotations

import json

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from depthprune_runtime import InputError, Runtime, export_model, import_model
from depthprune_runtime.checkpoint import open_checkpoint, write_native
from depthprune_runtime.plan import Drop, Narrow, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(file of ours, exported folder): F a a F F, with fewer KV groups in one attention."""
    folder = tmp_path_factory.mktemp("exported")
    parent = open_checkpoint(pico.save(pico.build_model("llama", num_hidden_layers=4), folder / "dense"))
    edits = (Drop(0), Drop(3), Drop(6), Narrow(4, (0, 2)))
    write_native(folder / "pruned.safetensors", PrunedCheckpoint(parent, PrunePlan("finercut", parent.digest(), edits)))
    export_model(folder / "pruned.safetensors", folder / "hf", "hf", check=False)
    return folder / "pruned.safetensors", folder / "hf"


@pytest.fixture
def folder(exported, tmp_path):
    """A copy to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in exported[1].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_import_and_run(exported, tmp_path):
    import_model(exported[1], tmp_path / "again.safetensors")
    assert open_checkpoint(tmp_path / "again.safetensors").digest() == open_checkpoint(exported[0]).digest()
    outputs = [
        Runtime.load(path, device="cpu").generate("the quick", temperature=0.0, max_tokens=8)[0].outputs[0].token_ids
        for path in (exported[0], tmp_path / "again.safetensors", exported[1])
    ]
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("target", ["gguf", "deci"])
def test_import_of_other_targets(tmp_path, target):
    """A stub and a zero FFN are in it; the file that it becomes says the same as it."""
    parent = open_checkpoint(pico.save(pico.build_model("llama", num_hidden_layers=4), tmp_path / "dense"))
    plan = PrunePlan("finercut", parent.digest(), (Drop(0), Drop(3), Drop(6)))
    write_native(tmp_path / "pruned.safetensors", PrunedCheckpoint(parent, plan))
    export_model(tmp_path / "pruned.safetensors", tmp_path / "out", target, check=False)
    import_model(tmp_path / "out", tmp_path / "again.safetensors", dtype="fp32")
    outputs = [
        Runtime.load(path, device="cpu").generate("the quick", temperature=0.0, max_tokens=8)[0].outputs[0].token_ids
        for path in (tmp_path / "pruned.safetensors", tmp_path / "again.safetensors")
    ]
    assert outputs[0] == outputs[1]


def test_without_lineage_layers_are_the_origins(exported, folder):
    change(folder, depthprune=None)
    found = open_checkpoint(folder)
    assert found.plan is None
    assert [s.origin for s in found.spec.sublayers] == [(0,), (0,), (1,), (1,), (1,)]
    assert found.checksums() == open_checkpoint(exported[0]).checksums()


def test_a_base_model_saved_alone_needs_its_head(folder):
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="without its output head"):
        open_checkpoint(folder)
    save_file({**bare, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(open_checkpoint(folder).tensor("lm_head.weight"), head)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"head_dim": None}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"per_layer_config": []}, "per_layer_config"),
        ({"per_layer_config": {"0": 3}}, "per_layer_config.0"),
        ({"per_layer_config": {"0": {"num_attention_heads": "9"}}}, "num_attention_heads"),
        ({"per_layer_config": {"0": {"qk_norm": "some"}}}, "qk_norm"),
        ({"per_layer_config": {"0": {"intermediate_sizes": [80], "mlps_before": 2}}}, "mlps_before"),
        ({"per_layer_config": {"1": {"intermediate_sizes": [80], "mlps_before": 1}}}, "mlps_before"),
        ({"per_layer_config": {"0": {"intermediate_sizes": [80], "mlp_down_bias": []}}}, "a bias an FFN"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": [["x"]] * 2}, "config.json"),
        ({"depthprune": {"origins": [[0]]}}, "origins"),
        ({"depthprune": {"origins": "x"}}, "origins"),
        ({"depthprune": {"plan": {"edits": 3}}}, "plan"),
        ({"depthprune": {"provenance": {"blocks": "7"}}}, "blocks"),
        ({"depthprune": {"provenance": {"blocks": 10**9}}}, "sub-layers only"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0]}}, "long_factor"),
    ],
)
def test_configs_that_are_refused(folder, values, message):
    change(folder, **values)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlps.0.up_proj.weight"
    save_file({**weights, name: weights[name][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="expected shape"):
        open_checkpoint(folder)
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is missing"):
        open_checkpoint(folder)
    extra = {"model.layers.1.self_attn.q_proj.bias": torch.zeros(1)}
    save_file({**weights, **extra}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="belong to layers"):
        open_checkpoint(folder)


def test_no_python_of_a_folder_runs(folder, monkeypatch):
    monkeypatch.setenv("RAN", "")
    for name in ("configuration_depthprune.py", "modeling_depthprune.py"):
        (folder / name).write_text("import os\nos.environ['RAN'] = 'yes'\n")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.assets["tokenizer.json"]
    import os

    assert os.environ["RAN"] == ""
