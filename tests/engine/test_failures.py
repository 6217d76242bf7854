"""What goes wrong with an engine: full queues, requests that cannot run, damaged logits, failed steps."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref

import pytest
from engine_runs import GREEDY, KINDS, SPECS, run
from random_decoder import decoder, engine, solo

from depthprune_runtime import InputError, SamplingParams
from depthprune_runtime.engine import runner
from depthprune_runtime.engine.errors import EngineDead, EngineFull


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
    monkeypatch.setattr(runner, "build_decode_step", lambda *_: None)


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
    assert "not finite" in bad.error
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
