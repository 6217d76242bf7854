"""What callers and files say is converted, bounded and refused before it reaches a step."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys

import numpy as np
import pico
import pytest
import torch
from engine_runs import GREEDY, SPECS, run
from random_decoder import engine, solo
from specs import mixed_spec

from depthprune_runtime import InputError, Runtime, SamplingParams, cli
from depthprune_runtime.engine import inputs, samplers
from depthprune_runtime.engine.values import shown
from depthprune_runtime.spec import AttentionSpec, DecoderSpec

SPEC = SPECS["plain"]  # 64 tokens, context 128
HUGE = 10**5000  # more digits than Python prints
BAD_PARAMS = {
    "n": [0, -1, 1.0, "1", True, 16385, 2**70, HUGE, None, [1]],
    "temperature": [-1e-9, 1e5, float("nan"), float("inf"), "1", None, HUGE, True, 1j, [1.0]],
    "top_p": [0, -0.5, 1.1, float("nan"), None, HUGE],
    "top_k": [-2, 1.5, 2**31, HUGE, None],
    "min_p": [-0.1, 1.1, float("nan"), None],
    "repetition_penalty": [0, 1e-40, 1e-3, 101, float("inf"), None],
    "seed": [-1, 2**64, HUGE, 1.5, "1", True],
    "stop": [5, "", [""], [5], b"x", {"a": 1}, ["\udcff"], [None]],
    "stop_token_ids": [5, "12", b"12", [-1], [1.0], [True], ["1"], {1: 2}, list(range(1025)), [None]],
    "ignore_eos": [1, "yes", None],
    "max_tokens": [0, -1, 1.5, "8", True],
    "min_tokens": [-1, 1.5, "1", None, True, 17, 2**31, HUGE],
    "presence_penalty": [-2.1, 2.1, float("nan"), float("inf"), "1", None, True],
    "frequency_penalty": [-2.1, 2.1, float("nan"), float("inf"), "1", None, True],
    "logit_bias": [5, "x", [1], {1: 101}, {1: float("nan")}, {1: "1"}, {-1: 1}, {"x": 1}, {"-1": 1}, {1.5: 1}, (1,)],
    "allowed_token_ids": [5, [], "12", [-1], [1.0], [True], [None], {1: 2}],
    "bad_words": [5, [""], [5], b"x", {"a": 1}, ["\udcff"], ["x" * 4097], ["x"] * 257],
    "logprobs": [-2, 1.5, 2**31, HUGE, True],
    "detokenize": [1, "no", None],
    "skip_special_tokens": [1, None],
    "spaces_between_special_tokens": [1, None],
    "include_stop_str_in_output": ["", None],
    "add_special_tokens": [0, None],
    "split_special_tokens": ["no", None],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in BAD_PARAMS.items() for v in values], ids=shown)
def test_bad_parameters_are_refused_in_one_short_line(name, value):
    with pytest.raises(InputError, match=f"^{name}: expected ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_every_parameter_has_its_bad_values():
    assert set(BAD_PARAMS) == {f.name for f in dataclasses.fields(SamplingParams)}


def test_numbers_of_numpy_and_torch_become_plain_ones():
    params = SamplingParams(
        n=np.int32(2),
        temperature=np.float32(0.5),
        top_p=torch.tensor(0.5),
        seed=np.uint64(2**64 - 1),
        max_tokens=torch.tensor(7),
        stop_token_ids=np.array([3, 3, 5], dtype=np.int16),
        logprobs=np.int64(2),
    )
    plain = SamplingParams(
        n=2, temperature=0.5, top_p=0.5, seed=2**64 - 1, max_tokens=7, stop_token_ids=(3, 5), logprobs=2
    )
    assert params == plain
    assert [type(v) for v in dataclasses.astuple(params)] == [type(v) for v in dataclasses.astuple(plain)]
    assert SamplingParams(stop_token_ids=torch.tensor([3, 5])).stop_token_ids == (3, 5)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


@pytest.mark.parametrize("ids", [[2**63], [2**63 - 1], [64], [HUGE]], ids=shown)
def test_end_tokens_beyond_the_vocabulary_never_reach_the_engine(ids):
    e = engine(SPEC, 30)
    e.add_request((1,), GREEDY, "other")
    with pytest.raises(InputError, match="stop_token_ids: expected token ids below 64"):
        e.add_request((1,), dataclasses.replace(GREEDY, stop_token_ids=ids))
    assert run(e)["other"][1].outputs[0].token_ids == solo(SPEC, (1,), GREEDY)


def test_extreme_but_allowed_parameters_run(pico_runtime):
    extremes = [
        {"max_tokens": HUGE},
        {"top_k": 2**31 - 1, "temperature": 1e4, "seed": 2**64 - 1, "max_tokens": 4},
        {"top_p": sys.float_info.min, "min_p": 1.0, "temperature": 1e-5, "max_tokens": 4},
        {"repetition_penalty": 0.01, "temperature": 1e-5, "max_tokens": 4},
        {"repetition_penalty": 100, "temperature": 0, "max_tokens": 4},
        {"stop_token_ids": list(range(pico.VOCAB_SIZE)), "max_tokens": 4},
    ]
    e = pico_runtime.engine(kv_memory="4MiB")
    for i, options in enumerate(extremes):
        e.add_request(
            [5, 6], SamplingParams(ignore_eos=True, **options), str(i), priority=-(2**31) if i % 2 else 2**31 - 1
        )
    results = run(e)
    assert {results[str(i)][1].outputs[0].finish_reason for i in range(len(extremes))} == {"length", "stop"}
    assert len(results["0"][1].outputs[0].token_ids) == pico.CONTEXT - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 2**31}, "priority: expected an integer"),
        ({"priority": True}, "priority: expected an integer"),
        ({"priority": HUGE}, "priority: expected an integer"),
        ({"request_id": ""}, "request_id: expected a string of 1 to 256 printable"),
        ({"request_id": "x" * 257}, "request_id: expected a string of 1 to 256 printable"),
        ({"request_id": "a\nb"}, "request_id: expected a string of 1 to 256 printable"),
        ({"request_id": "\udcff"}, "request_id: expected a string of 1 to 256 printable"),
        (
            {"sampling_params": dataclasses.replace(GREEDY, n=129)},
            r"n: expected at most 128 \(max_n and max_waiting\), got 129",
        ),
        ({"sampling_params": dataclasses.replace(GREEDY, logprobs=21)}, "logprobs: expected at most 20"),
        ({"prompt": [2**63]}, "below 64"),
        ({"prompt": [HUGE]}, "below 64"),
        ({"prompt": [True]}, "got True at index 0"),
        ({"prompt": [1, 2.0]}, "got 2.0 at index 1"),
        ({"prompt": np.array([1.0])}, "got 1.0 at index 0"),
        ({"prompt": torch.tensor([True])}, "got True at index 0"),
        ({"prompt": b"ab"}, "got bytes"),
        ({"prompt": {1, 2}}, "got set"),
        ({"prompt": None}, "got NoneType"),
        ({"prompt": np.int64(3)}, "got int64"),
        ({"prompt": {"text": "a"}}, 'a dictionary of "prompt" or "prompt_token_ids"'),
        ({"prompt": {}}, 'a dictionary of "prompt" or "prompt_token_ids"'),
        ({"prompt": {"prompt": 5}}, 'a string as "prompt"'),
        ({"prompt": {"prompt": None}}, "expected a string or a sequence"),
        ({"prompt": {"prompt_token_ids": "abc"}}, "got str"),
        ({"prompt": {"prompt_token_ids": [[1]]}}, r"got \[1\] at index 0"),
        ({"prompt": {"prompt": "\ud800x"}}, "expected Unicode text, got '.ud800' at character 0"),
        ({"prompt": "ab\udcff"}, "expected Unicode text, got '.udcff' at character 2"),
    ],
    ids=shown,
)
def test_bad_requests_are_refused_before_they_are_queued(options, message):
    e = engine(SPEC, 30)
    with pytest.raises(InputError, match=message) as caught:
        e.add_request(**{"prompt": (1,), "sampling_params": GREEDY, **options})
    assert len(str(caught.value)) < 300
    assert not e.has_unfinished()


def test_prompts_of_every_kind_are_the_same_prompt():
    expected = solo(SPEC, (5, 9, 2), GREEDY)
    ids = [5, 9, 2]
    kinds = [ids, tuple(ids), np.array(ids), torch.tensor(ids), [np.int64(5), torch.tensor(9), 2]]
    e = engine(SPEC, 60)
    asked = [e.add_request(prompt, GREEDY) for prompt in (*kinds, *({"prompt_token_ids": k} for k in kinds))]
    results = run(e)
    assert [results[a][1].outputs[0].token_ids for a in asked] == [expected] * 10
    assert all(type(i) is int for a in asked for i in results[a][1].prompt_token_ids)


def test_dictionaries_of_vllm(pico_runtime):
    def tokens(prompts):
        return [(o.prompt, o.outputs[0].token_ids) for o in pico_runtime.generate(prompts, GREEDY)]

    ids = pico_runtime.tokenizer.encode("the quick")
    (plain,) = tokens("the quick")
    assert tokens({"prompt": "the quick"}) == [plain]
    assert tokens({"prompt_token_ids": ids}) == [(None, plain[1])]
    assert (
        tokens([{"prompt_token_ids": ids, "prompt": "the quick"}, "the quick", {"prompt": "the quick"}]) == [plain] * 3
    )
    assert tokens(np.array([ids, ids])) == [(None, plain[1])] * 2
    assert tokens(torch.tensor(ids)) == [(None, plain[1])]


@pytest.mark.parametrize(
    "prompts", [5, None, 1.5, b"text", True, {1: 2}, [[True]], [True], {"a", "b"}, iter(["a"]), [b"a"], [None]]
)
def test_what_is_no_prompt_is_refused(pico_runtime, prompts):
    with pytest.raises(InputError, match=r"^prompts?: expected "):
        pico_runtime.generate(prompts)
    with pytest.raises(InputError, match=r"^prompts?: expected "):
        pico_runtime.stream(prompts)


@pytest.mark.parametrize(
    "ids",
    [
        "abc",
        [2**70],
        [1.0],
        [True],
        [],
        [[]],
        [[1], [1, 2]],
        [[1], 2],
        5,
        None,
        torch.tensor([1.5]),
        [[[1]]],
        ["a"],
        b"ab",
    ],
)
def test_logits_take_token_ids_only(pico_runtime, ids):
    with pytest.raises(InputError, match=r"^ids(\[\d\])?: expected "):
        pico_runtime.logits(ids)


def test_logits_of_every_kind_of_ids(pico_runtime):
    ids = [[5, 6, 7], [8, 9, 10]]
    expected = pico_runtime.logits(ids)
    assert expected.shape == (2, 3, pico.VOCAB_SIZE)
    for same in (torch.tensor(ids), np.array(ids), tuple(map(tuple, ids)), torch.tensor(ids, dtype=torch.int32)):
        assert torch.equal(pico_runtime.logits(same), expected)
    assert torch.equal(pico_runtime.logits(torch.tensor(ids[0])), pico_runtime.logits(ids[0]))


def test_two_names_of_one_option_are_refused(pico_runtime):
    with pytest.raises(InputError, match="max_new_tokens: another name of max_tokens"):
        pico_runtime.generate("the", max_tokens=3, max_new_tokens=3)


@pytest.mark.parametrize("model", [None, 5, b"path", "", ["a"]])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(InputError, match="model: expected a file, a folder or a hub id"):
        Runtime.load(model)


def test_the_number_of_outputs_is_checked_before_anything_is_made(monkeypatch):
    made = []
    monkeypatch.setattr(inputs, "Request", lambda *_: made.append(1))
    for e, most in ((engine(SPEC, 30), 128), (engine(SPEC, 30, max_waiting=5), 5), (engine(SPEC, 30, max_n=3), 3)):
        for n in (16384, most + 1):
            with pytest.raises(InputError, match=f"n: expected at most {most} "):
                e.prepare((1,), SamplingParams(n=n, repetition_penalty=1.1))
    with pytest.raises(InputError, match="n: expected an integer from 1 to 16384"):
        SamplingParams(n=100_000, repetition_penalty=1.1)
    assert not made


def test_waiting_requests_have_no_samplers(monkeypatch):
    made, masks = [], []
    plain, plain_mask = samplers.RequestSampler, samplers.seen_tokens
    monkeypatch.setattr(samplers, "RequestSampler", lambda *a: made.append(1) or plain(*a))
    monkeypatch.setattr(samplers, "seen_tokens", lambda *a: masks.append(1) or plain_mask(*a))
    e = engine(SPEC, 30, max_num_seqs=2)
    params = dataclasses.replace(GREEDY, n=9, repetition_penalty=1.3)
    request_id = e.add_request((1, 2), params)
    assert not made
    e.step()
    assert len(made) == 2
    outputs = run(e)[request_id][1].outputs
    assert {o.token_ids for o in outputs} == {solo(SPEC, (1, 2), dataclasses.replace(params, n=1))}
    assert (len(made), len(masks)) == (9, 1)  # the prompt's tokens are looked at once


def test_wrong_end_tokens_of_a_file_are_named_and_left_out(pico_llama, tmp_path, caplog):
    folder = pico.save(pico_llama[0], tmp_path)
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [9223372036854775808, 384, -1, true, "2", 2.5, 7]}'
    )
    with caplog.at_level(logging.WARNING, "depthprune_runtime"):
        runtime = Runtime.load(folder, device="cpu")
    warnings = [r.getMessage() for r in caplog.records if "eos_token_id" in r.getMessage()]
    assert len(warnings) == 1
    assert "9223372036854775808, 384, -1, True, '2', 2.5" in warnings[0]
    assert "its generation_config.json: eos_token_id: expected ids below 384, got [" in warnings[0]
    request = runtime.engine(kv_memory="1MiB").prepare([5, 6], GREEDY.__class__()).requests[0]
    assert request.end_ids == [1, 7]  # the tokenizer's, and the one that is good
    runtime.generate([5, 6], max_new_tokens=3)


@pytest.mark.parametrize(
    "text",
    [
        '{"do_sample": true, "temperature": "hot"}',
        '{"repetition_penalty": 1e-40}',
        '{"do_sample": true, "top_k": 1e400}',
    ],
)
def test_sampling_of_a_file_is_checked_when_it_is_loaded(pico_llama, tmp_path, text, caplog):
    folder = pico.save(pico_llama[0], tmp_path)
    (folder / "generation_config.json").write_text(text)
    params = Runtime.load(folder, device="cpu").default_sampling_params
    assert params == SamplingParams(temperature=1.0 if "do_sample" in text else 0.0, max_tokens=128)
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1
    assert re.search(r"its generation_config\.json has values that are left out: \w+: expected ", warnings[0])


@pytest.mark.parametrize("window", [2**31, 2**63, HUGE], ids=shown)
def test_a_window_that_no_kernel_can_count_is_refused(window):
    with pytest.raises(InputError, match=r"sliding_window: expected an integer (below 2\*\*31|>= 1)"):
        AttentionSpec(4, 2, 8, (0,), sliding_window=window)
    with pytest.raises(InputError, match="max_position_embeddings"):
        dataclasses.replace(SPEC, max_position_embeddings=window)


def test_the_largest_window_is_none():
    wide = mixed_spec(window=2**31 - 1)
    e = engine(wide, 30)
    request_id = e.add_request((1, 2, 3), GREEDY)
    assert isinstance(wide, DecoderSpec)
    assert run(e)[request_id][1].outputs[0].token_ids == solo(wide, (1, 2, 3), GREEDY)


def test_a_prompt_of_bytes_that_are_no_text_is_one_line(pico_file, pico_runtime, capsys):
    """The shell's $'\\xff' comes as a lone surrogate."""
    for extra in ([], ["--chat"]):
        assert cli.main(["generate", str(pico_file), "-p", "ab\udcff", *extra]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert "expected Unicode text, got" in said.err
    with pytest.raises(InputError, match="expected Unicode text, got NoneType"):
        pico_runtime.tokenizer.encode(None)
