"""What a model's configs say about its outputs: end tokens and sampling, also where they are damaged."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pico
import pytest

from depthprune_runtime import Runtime, import_model
from depthprune_runtime.engine.inputs import Inputs
from depthprune_runtime.generation_config import generation_config


@pytest.fixture
def folder(pico_llama, tmp_path):
    """The model without a generation config."""
    saved = pico.save(pico_llama[0], tmp_path / "model")
    (saved / "generation_config.json").unlink()
    return saved


def with_end(folder, end):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("skip_tokenizer_init", [False, True])
@pytest.mark.parametrize("imported", [False, True])
def test_an_end_token_of_config_json_alone_ends_outputs(pico_runtime, folder, several, skip_tokenizer_init, imported):
    free = pico_runtime.generate([5, 6, 7], temperature=0, max_new_tokens=12, ignore_eos=True)[0].outputs[0].token_ids
    end = free[4]
    with_end(folder, [end, 383] if several else end)
    model = folder
    if imported:
        model = folder.parent / "model.safetensors"
        import_model(folder, model)
    runtime = Runtime.load(model, device="cpu", skip_tokenizer_init=skip_tokenizer_init)
    out = runtime.generate([5, 6, 7], temperature=0, max_new_tokens=12)[0].outputs[0]
    assert (out.finish_reason, out.stop_reason) == ("stop", None)
    assert out.token_ids == free[: free.index(end) + 1]


def test_a_generation_config_decides_alone_where_it_is_there(folder, pico_runtime):
    free = pico_runtime.generate([5, 6, 7], temperature=0, max_new_tokens=12, ignore_eos=True)[0].outputs[0].token_ids
    with_end(folder, free[4])
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    out = Runtime.load(folder, device="cpu").generate([5, 6, 7], temperature=0, max_new_tokens=12)[0].outputs[0]
    assert len(out.token_ids) > 5 or 1 in out.token_ids


@pytest.mark.parametrize(
    "stored", [b"{", b"[1]", b"3", b"\xff\xfe\xfd", b"[" * 100_000, b'{"a": 1' + b"0" * 9000 + b"}"]
)
def test_a_damaged_generation_config_is_named_and_left_out(stored, caplog):
    checkpoint = SimpleNamespace(name="m.safetensors", assets={"generation_config.json": stored})
    assert generation_config(checkpoint) == {}
    assert len(caplog.records) == 1
    assert "m.safetensors: its generation_config.json is ignored: " in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"temperature": -1, "top_k": 2.5},
        {"top_p": [1]},
        {"repetition_penalty": {}},
        {"do_sample": "no"},
        {"do_sample": 0},
        {"do_sample": -0.0},
        {"do_sample": ""},
        {"do_sample": []},
    ],
)
@pytest.mark.parametrize("samples", [True, False])
def test_values_of_the_wrong_type_are_named_once_and_left_out(pico_runtime, config, samples, caplog):
    config = {"do_sample": samples, "top_p": 0.5, "repetition_penalty": 1.5, **config}
    params = Inputs("m", pico_runtime.spec, None, config).default_sampling_params
    good = {n: v for n, v in (("top_p", 0.5), ("repetition_penalty", 1.5)) if config[n] == v}
    assert params.repetition_penalty == good.get("repetition_penalty", 1.0)
    assert params.greedy == (config["do_sample"] is not True)
    assert params.top_p == (good.get("top_p", 1.0) if config["do_sample"] is True else 1.0)
    warned = [r.getMessage() for r in caplog.records]
    assert len(warned) == 1 and len(warned[0]) < 400
    assert warned[0].startswith("m: its generation_config.json has values that are left out: ")


@pytest.mark.parametrize(
    ("stated", "wrong"), [([1, None], "[None]"), ([1, 1.0], "[1.0]"), (0.0, "[0.0]"), ("1", "['1']"), ({}, "[{}]")]
)
def test_end_tokens_of_the_wrong_type_are_named(pico_runtime, stated, wrong, caplog):
    Inputs("m", pico_runtime.spec, None, {"eos_token_id": stated})
    (warned,) = (r.getMessage() for r in caplog.records)
    assert warned.startswith("m: its generation_config.json: eos_token_id: expected ids below ")
    assert f"got {wrong}; outputs do not end at them" in warned


@pytest.mark.parametrize("stated", [None, [], 1, [1, 2]])
def test_end_tokens_that_may_be_stated_are_taken_without_a_word(pico_runtime, stated, caplog):
    Inputs("m", pico_runtime.spec, None, {"eos_token_id": stated, "do_sample": None})
    assert not caplog.records
