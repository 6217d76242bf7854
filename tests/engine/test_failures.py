"""What goes wrong with an engine: full queues, requests that cannot run, damaged logits, failed steps."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref

import pytest
import torch
from engine_runs import GREEDY, KINDS, SAMPLED, SPECS, run
from random_decoder import decoder, engine, sampler_of, solo

from depthprune_runtime import InputError, SamplingParams
from depthprune_runtime.engine import inputs, runner, samplers
from depthprune_runtime.engine.decode_paths import OpByOp
from depthprune_runtime.engine.errors import EngineDead, EngineFull
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.sampler import NOT_FINITE, sample_batch


def test_the_waiting_queue_pushes_back_and_recovers():
    e = engine(SPECS["plain"], 30, max_num_seqs=1, max_waiting=2)
    for i in range(2):
        e.add_request((i,), GREEDY)
    with pytest.raises(EngineFull, match="at most 2 outputs"):
        e.add_request((7,), GREEDY)
    e.step()
    e.add_request((7,), GREEDY, "late")
    assert run(e)["late"][1].outputs[0].token_ids == solo(SPECS["plain"], (7,), GREEDY)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ((), {}, "empty"),
        ((5, 64), {}, "below 64, got 64"),
        ([7] * 128, {}, "at most 127 tokens"),
        ([7] * 90, {"sampling_params": dataclasses.replace(GREEDY, max_tokens=32)}, "never fit into the KV cache"),
        ("text", {}, "no tokenizer"),
        (17, {}, "expected a string or a sequence of token ids, got int"),
        ((1,), {"sampling_params": SamplingParams(stop="x")}, "stop_token_ids"),
        ((1,), {"sampling_params": {"n": 1}}, "expected SamplingParams, got dict"),
        ((1,), {"priority": 0.5}, "priority: expected an integer"),
        ((1,), {"request_id": 7}, "request_id: expected a string"),
        ((1,), {"request_id": "twice"}, "'twice' is in use"),
    ],
)
def test_what_can_never_run_is_refused_at_once(prompt, options, message):
    e = engine(SPECS["plain"], 30)
    e.add_request((1,), GREEDY, "twice")
    with pytest.raises(InputError, match=message):
        e.add_request(prompt, **options)
    assert run(e)["twice"][1].outputs[0].finish_reason == "length"


def test_parameters_broken_after_their_making_are_refused():
    params = SamplingParams()
    object.__setattr__(params, "stop", (3,))
    with pytest.raises(InputError, match="stop: expected non-empty strings"):
        engine(SPECS["plain"], 30).add_request((1,), params)


@pytest.fixture
def by_ops(monkeypatch):
    """Every step goes through the decoder's methods, which a test may then replace."""
    monkeypatch.setattr(runner, "choose_path", OpByOp)


def test_damaged_logits_end_their_own_request_only(monkeypatch, caplog, by_ops):
    """Row 1 of the third step is NaN: that request fails, and nobody reads what it cached."""
    spec = SPECS["plain"]
    e = engine(spec, 60)
    prompts = [tuple(range(i, i + 9)) for i in range(3)]
    for i, prompt in enumerate(prompts):
        e.add_request(prompt, KINDS[i], str(i))
    plain, calls = decoder(spec).logits, []

    def damaged(hidden):
        calls.append(1)
        logits = plain(hidden).clone()
        if len(calls) == 3:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(decoder(spec), "logits", damaged)
    with caplog.at_level(logging.WARNING, "depthprune_runtime"):
        results = run(e)
    bad = results["1"][1].outputs[0]
    assert (bad.finish_reason, bad.token_ids) == ("error", solo(spec, prompts[1], KINDS[1])[:2])
    assert bad.error.startswith("model random: logits are not finite: ")
    assert "request 1 failed" in caplog.text
    for i in (0, 2):
        assert results[str(i)][1].outputs[0].token_ids == solo(spec, prompts[i], KINDS[i])
        assert results[str(i)][1].outputs[0].error is None
    monkeypatch.undo()
    again = e.add_request(prompts[1], KINDS[1])
    result = run(e)[again][1]
    assert result.num_cached_tokens == 0
    assert result.outputs[0].token_ids == solo(spec, prompts[1], KINDS[1])


def test_a_text_decoder_that_raises_ends_its_own_request_only(pico_runtime):
    class Broken:
        def push(self, token_id):
            raise UnicodeError("no such character")

        def flush(self):
            return ""

    e = pico_runtime.engine(kv_memory="1MiB")
    group = e.prepare("the quick", GREEDY, "bad")
    group.requests[0]._source = Broken()
    e.add(group)
    e.add_request("the quick", GREEDY, "good")
    results = run(e)
    bad = results["bad"][1].outputs[0]
    assert bad.finish_reason == "error"
    assert bad.error == "its text cannot be decoded: UnicodeError: no such character"
    assert results["good"][1].text == pico_runtime.generate("the quick", GREEDY).text


class BrokenMessage(Request):
    """Its text can be taken only while it is short."""

    def take_news(self) -> str:
        if self.num_output_tokens == 3:
            raise ValueError("no text")
        return super().take_news()


def test_whatever_fails_in_the_text_of_one_request_ends_it_alone(monkeypatch):
    e = engine(SPECS["plain"], 60)
    e.add_request((1, 2), GREEDY, "good")
    monkeypatch.setattr(inputs, "Request", BrokenMessage)
    e.add_request((3, 4), GREEDY, "bad")
    results = run(e)
    assert results["bad"][1].outputs[0].error == "its text cannot be decoded: ValueError: no text"
    assert results["bad"][1].outputs[0].token_ids == solo(SPECS["plain"], (3, 4), GREEDY)[:3]
    assert results["good"][1].outputs[0].token_ids == solo(SPECS["plain"], (1, 2), GREEDY)


@pytest.mark.parametrize("where", ["RequestSampler", "next_tokens", "top_logprobs"])
def test_a_sampler_that_fails_ends_its_own_request_only(monkeypatch, where):
    """The others go on with the random numbers that they would have had."""
    spec, bad = SPECS["plain"], dataclasses.replace(SAMPLED, seed=99, logprobs=3)
    plain, failed = getattr(samplers, where), []

    def fail(*args):
        hit = {
            "RequestSampler": lambda: args[0].seed == 99,
            "next_tokens": lambda: any(s.params.seed == 99 for s in args[1]),
            "top_logprobs": lambda: 3 in args[2],
        }[where]()
        if hit:
            failed.append(1)
            raise ArithmeticError("cannot")
        return plain(*args)

    monkeypatch.setattr(samplers, where, fail)
    e = engine(spec, 100)
    prompts = [tuple(range(i, i + 4)) for i in range(len(KINDS))]
    for i, (prompt, params) in enumerate(zip(prompts, KINDS, strict=True)):
        e.add_request(prompt, params, str(i))
        if i == 2:
            e.add_request((9, 9), bad, "bad")
    results = run(e)
    output = results["bad"][1].outputs[0]
    assert (output.finish_reason, output.token_ids) == ("error", ())
    assert output.error == "its next token cannot be chosen: ArithmeticError: cannot"
    assert failed
    for i, (prompt, params) in enumerate(zip(prompts, KINDS, strict=True)):
        assert results[str(i)][1].outputs[0].token_ids == solo(spec, prompt, params)
    assert e.stats().kv_usage == 0.0


def test_logits_that_a_parameter_breaks_end_the_request_not_its_tokens():
    """A penalty beyond the range makes the distribution infinite; the vocabulary's last token is no answer."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    for temperature in (0.0, 0.7):
        params = SamplingParams(temperature=temperature, seed=1, repetition_penalty=0.01)
        object.__setattr__(params, "repetition_penalty", 1e-40)
        assert sample_batch(logits, [sampler_of(params, (0, 1), 0, 4)]) == [NOT_FINITE]


def test_one_failed_output_does_not_lose_the_others(pico_runtime, monkeypatch):
    prompts = ["the quick", "a decoder", "prune the"]
    expected = [o.outputs[0].token_ids for o in pico_runtime.generate(prompts, GREEDY)]
    bad = [2]
    monkeypatch.setattr(
        samplers.Samplers,
        "choose",
        lambda self, requests, logits, choose=samplers.Samplers.choose: [
            c if r.request_id not in map(str, bad) else samplers.Choice(NOT_FINITE, None, "damaged")
            for r, c in zip(requests, choose(self, requests, logits), strict=True)
        ],
    )
    outputs = pico_runtime.generate(prompts, GREEDY)
    assert [o.outputs[0].token_ids for o in outputs[:2]] == expected[:2]
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "length", "error"]
    assert [o.outputs[0].error for o in outputs] == [None, None, "damaged"]
    chunks = list(pico_runtime.stream(prompts, GREEDY))
    ends = {c.request_index: (c.finish_reason, c.error) for c in chunks if c.finish_reason is not None}
    assert ends == {0: ("length", None), 1: ("length", None), 2: ("error", "damaged")}
    bad[:] = [0, 1, 2]
    with pytest.raises(InputError, match="damaged"):
        pico_runtime.generate(prompts, GREEDY)
    with pytest.raises(InputError, match="damaged"):
        list(pico_runtime.stream("the quick", GREEDY))


def test_automatic_ids_are_nobody_elses():
    e = engine(SPECS["plain"], 60)
    for i in range(4):
        e.add_request((1,), GREEDY, f"request-{i}")
    automatic = [e.add_request((1,), GREEDY) for _ in range(4)]
    assert len({*automatic, *(f"request-{i}" for i in range(4))}) == 8
    assert len(run(e)) == 8


def test_a_failed_step_stops_the_engine_for_good(monkeypatch, by_ops):
    e = engine(SPECS["plain"], 30)
    e.add_request((1,), GREEDY)
    fault = RuntimeError("device lost")

    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(decoder(SPECS["plain"]), "hidden_states", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        e.step()
    assert not e.has_unfinished()
    for call in (e.step, lambda: e.add_request((1,), GREEDY), lambda: e.abort("request-0")):
        with pytest.raises(EngineDead, match="device lost") as caught:
            call()
        assert caught.value.__cause__ is fault


def test_a_closed_engine_says_so():
    e = engine(SPECS["plain"], 30)
    e.add_request((1,), GREEDY)
    e.close()
    e.close()
    assert not e.has_unfinished()
    with pytest.raises(EngineDead, match="it was closed"):
        e.step()


def test_a_closed_engine_gives_its_kv_cache_back():
    e = engine(SPECS["plain"], 30)
    e.add_request((1,), GREEDY)
    e.step()
    held = [weakref.ref(tensor) for pair in e._cache.pairs for tensor in pair or ()]
    assert e.kv_cache_bytes > 0 and all(ref() is not None for ref in held)
    e.close()
    gc.collect()
    assert e.kv_cache_bytes == 0 and all(ref() is None for ref in held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_memory": 10}, "expected at least 1024 bytes, the size of one kv_block"),
        ({"kv_memory": "lots"}, "expected bytes .* got 'lots'"),
        ({"kv_memory": "2 GiBB"}, "expected bytes"),
        ({"kv_memory": 1.5}, "expected bytes"),
        ({"kv_memory": 0.0}, "expected bytes"),
        ({"kv_memory": True}, "expected bytes"),
        ({"kv_memory": -1}, "expected bytes"),
        ({"max_num_seqs": 0}, "max_num_seqs: expected an integer from 1 to 65536, got 0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens: expected an integer >= 9"),
        ({"max_waiting": 0}, "max_waiting"),
        ({"kv_block_size": 2.0}, "kv_block_size"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        engine(SPECS["plain"], **{"kv_block_size": 4, **options})
