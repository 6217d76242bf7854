"""Mamba and RWKV: what is refused, and what an interrupt leaves."""

from __future__ import annotations

import json

import pico
import pytest
import torch
from other_models import WINDOWS, build
from safetensors.torch import load_file, save_file

from depthprune_runtime import FinerCutOptions, InputError, RepairOptions, ShortGPTOptions, prune
from depthprune_runtime.pruning.plan import PrunePlan
from depthprune_runtime.pruning.recurrent import folder as other_folder
from depthprune_runtime.pruning.recurrent.prune import prune_other


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


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_prune_goes_by_the_architecture(parents, tmp_path, family):
    result = prune(parents[family], tmp_path / "out", blocks=2, options=ShortGPTOptions("reverse"), device="cpu")
    assert (result.spec, result.parent) == (None, None)
    assert result.plan.dropped() == {3, 4}
    assert result.plan.removal_order() == (4, 3, 2, 1, 0)
    assert PrunePlan.from_json(result.plan.to_json()) == result.plan
    stored = json.loads((tmp_path / "out" / other_folder.PLAN_FILE).read_text())
    assert stored["dropped_blocks"] == [3, 4]
    assert (result.parameters, result.parent_parameters) == (stored["parameters"], stored["parent_parameters"])
    assert result.sparsity == stored["sparsity"]


def test_prune_draws_windows_of_its_text(parents, tmp_path):
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    options = {"calibration": str(text), "samples": 4, "seq_len": 16, "device": "cpu"}
    result = prune(parents["mamba"], tmp_path / "out", blocks=1, **options)
    settings = result.plan.settings
    assert (settings["score"], settings["protect_last"], settings["model_type"]) == ("block-influence", True, "mamba")
    assert {name: settings["calibration"][name] for name in ("samples", "seq_len", "text")} == {
        "samples": 4, "seq_len": 16, "text": "text"
    }  # fmt: skip
    influence = settings["scores"]["block-influence"]
    assert result.plan.dropped() == {min(range(4), key=lambda block: influence[block])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repair": "ridge"}, "take no option repair"),
        ({"repair": RepairOptions()}, "take no option repair"),
        ({"overwrite": True}, "take no option overwrite"),
        ({"max_shard_size": "1GB"}, "take no option max_shard_size"),
        ({"method": "flattengpt"}, "only be pruned by shortgpt, got flattengpt"),
        ({"options": FinerCutOptions()}, "only be pruned by shortgpt, got finercut"),
        ({"blocks": None, "sublayers": 2}, "not made of attention and FFN"),
        ({"options": ShortGPTOptions("after-repair")}, "score: expected one of block-influence"),
        ({"calibration": "/nowhere.txt"}, "no such file"),
        ({"seed": "x", "samples": 1, "seq_len": 16}, "seed: expected an integer"),
        ({"samples": 0}, "samples: expected an integer from 1 on"),
        ({"sparsity": 0.5}, "exactly one"),
        ({"method": "magic"}, "method: expected one of"),
    ],
)
def test_prune_refuses_what_makes_no_sense_there(parents, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        prune(parents["mamba"], tmp_path / "out", **({"blocks": 1, "device": "cpu"} | options))
    assert not list(tmp_path.iterdir())
