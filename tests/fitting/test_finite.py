"""Weights that are not finite, and numbers that overflow: one line that names the block and the remedy."""

from __future__ import annotations

import math

import pico
import pytest
import torch
from flat_options import arguments

from depthprune_runtime import InputError, Runtime, perplexity, prune, quantize
from depthprune_runtime.cli import main
from depthprune_runtime.fitting.finite import is_finite
from depthprune_runtime.texts import load_text

SMALL = {"samples": 4, "seq_len": 32, "device": "cpu"}
METHODS = [
    {"method": "shortgpt", "blocks": 1},
    {"method": "shortgpt", "blocks": 1, "score": "block-influence"},
    {"method": "shortgpt", "blocks": 1, "score": "reverse"},
    {"method": "finercut", "sublayers": 1},
    {"method": "flattengpt", "blocks": 1},
    {"method": "flattengpt", "blocks": 1, "grouping": "similarity", "selection": "importance"},
]


@pytest.fixture(scope="module")
def nan_model(tmp_path_factory):
    """One NaN in the FFN of block 2."""
    folder = pico.save(pico.build_model("llama", num_hidden_layers=4), tmp_path_factory.mktemp("nan"))
    return pico.save_damaged(folder, folder / "nan.model", "sublayers.5.down_proj.weight", math.nan)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """Finite weights in fp16 whose activations from block 1 on leave its range, and not that of bf16."""
    model = pico.build_model("llama", num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e4)
        model.model.layers[1].mlp.up_proj.weight.mul_(50.0)
    return pico.save(model.half(), tmp_path_factory.mktemp("large"))


def refused(call) -> str:
    with pytest.raises(InputError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("repair", ["ridge", "none"])
def test_damaged_weights_are_named(nan_model, tmp_path, options, repair):
    if repair == "none" and options.get("score") == "reverse":
        pytest.skip("computes nothing")
    settings = {name: value for name, value in options.items() if repair == "ridge" or name != "selection"}
    message = refused(lambda: prune(nan_model, tmp_path / "out", **arguments(settings), repair=repair, **SMALL))
    if options["method"] == "finercut":
        assert "logits are not finite" in message
    else:
        assert "sublayers.5.down_proj.weight (block 2) holds infinite or NaN weights" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("repair", ["ridge", "none"])
def test_an_overflow_is_no_damage(large_model, tmp_path, options, repair):
    if repair == "none" and options.get("score") == "reverse":
        pytest.skip("computes nothing")
    settings = {name: value for name, value in options.items() if repair == "ridge" or name != "selection"}
    message = refused(lambda: prune(large_model, tmp_path / "out", **arguments(settings), repair=repair, **SMALL))
    assert "bf16 or fp32" in message
    if options["method"] != "finercut":
        assert "the ffn of block 1" in message
        assert "damaged" not in message
    assert prune(
        large_model, tmp_path / "out", **arguments(settings), repair=repair, dtype="bf16", **SMALL
    ).path.is_file()


def test_quantize_names_them_too(nan_model, large_model, tmp_path):
    options = {"group_size": 32, **SMALL}
    assert "down_proj" in refused(lambda: quantize(nan_model, tmp_path / "out", 4, **options))
    assert "bf16 or fp32" in refused(lambda: quantize(large_model, tmp_path / "out", 4, **options))


def test_there_is_no_perplexity_of_logits_that_are_not_finite(nan_model, large_model, tmp_path, capsys):
    text = load_text("builtin-test")
    for model in (nan_model, large_model):
        runtime = Runtime.load(model, device="cpu")
        assert "logits of window 1 are not finite" in refused(lambda r=runtime: perplexity(r, text, 64, 2))
    args = ["perplexity", str(large_model), "--text", "builtin-test", "--seq-len", "64", "--windows", "2", "-q"]
    capsys.readouterr()
    assert main(args) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "bf16 or fp32" in err
    assert main([*args, "--dtype", "fp32", "--json"]) == 0


def test_a_loss_beyond_all_numbers_is_refused(pico_runtime, monkeypatch):
    monkeypatch.setattr("depthprune_runtime.evaluation.perplexity.window_nll", lambda *_: 800.0)
    assert "beyond all numbers" in refused(lambda: perplexity(pico_runtime, load_text("builtin-test"), 64, 2))


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    """Ids beyond the embedding, wherever a text becomes ids."""
    model = pico.build_model("llama", num_hidden_layers=3, vocab_size=60)
    folder = pico.save(model, tmp_path / "model")
    calls = [
        lambda: prune(folder, tmp_path / "out", blocks=1, **SMALL),
        lambda: quantize(folder, tmp_path / "out", 4, group_size=32, **SMALL),
        lambda: perplexity(Runtime.load(folder, device="cpu"), load_text("builtin-test"), 64, 2),
    ]
    for call in calls:
        message = refused(call)
        assert "its embedding has 60 rows" in message
        assert "tokenizer is that of another model" in message


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_is_enough(bad):
    values = torch.zeros(7, 5, dtype=torch.float16)
    assert is_finite(values)
    values[6, 4] = bad
    assert not is_finite(values)
    assert is_finite(torch.full((70_000,), 60_000.0, dtype=torch.float16))  # their sum is not
