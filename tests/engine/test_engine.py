"""The engine: every request gets what it would get alone, nothing leaks, one bad request harms no other."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from random_decoder import decoder, engine, solo
from specs import mixed_spec, plain_spec

from depthprune_runtime import InputError, SamplingParams
from depthprune_runtime.engine import runner
from depthprune_runtime.engine.errors import EngineDead, EngineFull

SPECS = {
    "plain": plain_spec(2),
    "mixed widths": mixed_spec(),
    "sliding window": mixed_spec(window=5),
    "attention only": mixed_spec(kinds="aaa"),
    "FFN only": mixed_spec(kinds="fF"),
}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=3)
KINDS = (
    GREEDY,
    SAMPLED,
    dataclasses.replace(SAMPLED, top_k=7, top_p=0.9, seed=4),
    dataclasses.replace(GREEDY, repetition_penalty=1.7),
    dataclasses.replace(SAMPLED, repetition_penalty=1.3, min_p=0.02, logprobs=2),
)
BEGINNINGS = [(5,) * 11, tuple(range(20, 33)), (1, 2, 3)]


def run(e, results=None) -> dict:
    """Step to the end; request id -> (joined deltas of each output, result)."""
    results = {} if results is None else results
    for _ in range(5000):
        if not e.has_unfinished():
            e.check()
            return results
        collect(e, results)
    raise AssertionError("it does not end")


def collect(e, results) -> None:
    for delta in e.step():
        ids, _ = results.setdefault(delta.request_id, ({}, None))
        ids[delta.output_index] = ids.get(delta.output_index, ()) + delta.token_ids
        results[delta.request_id] = (ids, delta.result)
    e.check()


class Service(RuleBasedStateMachine):
    @initialize(
        name=st.sampled_from(sorted(SPECS)),
        kv_blocks=st.integers(8, 14),
        seqs=st.integers(1, 5),
        extra=st.integers(0, 12),
        caching=st.booleans(),
    )
    def start(self, name, kv_blocks, seqs, extra, caching):
        self.spec = SPECS[name]
        options = {"max_num_seqs": seqs, "max_num_batched_tokens": seqs + extra, "max_waiting": 12}
        self.engine = engine(self.spec, kv_blocks, enable_prefix_caching=caching, **options)
        self.asked = {}
        self.aborted = set()
        self.results = {}

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        length=st.integers(1, 13),
        end=st.lists(st.integers(0, 3), max_size=3),
        params=st.sampled_from(KINDS),
        n=st.integers(1, 2),
        priority=st.integers(0, 1),
    )
    def add(self, beginning, length, end, params, n, priority):
        prompt = (*beginning[:length], *end)
        params = dataclasses.replace(params, n=n)
        try:
            self.asked[self.engine.add_request(prompt, params, priority=priority)] = (prompt, params)
        except EngineFull:
            assert self.engine.stats().num_waiting + n > 12

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            collect(self.engine, self.results)

    @rule(which=st.integers(0, 20))
    def abort(self, which):
        if self.asked:
            request_id = list(self.asked)[which % len(self.asked)]
            if self.engine.abort(request_id):
                self.aborted.add(request_id)
                self.engine.check()

    @invariant()
    def whole(self):
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        run(self.engine, self.results)
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
        assert set(self.results) == set(self.asked)
        for request_id, (prompt, params) in self.asked.items():
            deltas, result = self.results[request_id]
            assert result.prompt_token_ids == prompt
            for i, output in enumerate(result.outputs):
                assert deltas[i] == output.token_ids
                expected = solo(self.spec, prompt, dataclasses.replace(params, n=1), i)
                if request_id in self.aborted and output.finish_reason == "abort":
                    assert output.token_ids == expected[: len(output.token_ids)]
                else:
                    assert (output.finish_reason, output.token_ids) == ("length", expected)
                if params.logprobs is not None:
                    assert len(output.logprobs) == len(output.token_ids)


TestService = Service.TestCase
TestService.settings = settings(max_examples=25, stateful_step_count=16, deadline=None)


@pytest.mark.parametrize("name", SPECS)
def test_every_architecture_under_pressure_equals_alone(name):
    """Few kv_blocks, small chunks: preemption, recomputation and sharing for each kind of pruned model."""
    spec = SPECS[name]
    e = engine(spec, 9, max_num_seqs=4, max_num_batched_tokens=9)
    prompts = [(*BEGINNINGS[i % 2][: 9 + i % 3], i % 4) for i in range(8)]
    asked = {e.add_request(p, KINDS[i % len(KINDS)]): (p, KINDS[i % len(KINDS)]) for i, p in enumerate(prompts)}
    results = run(e)
    for request_id, (prompt, params) in asked.items():
        assert results[request_id][1].outputs[0].token_ids == solo(spec, prompt, params)
    if spec.attention_sublayers():
        assert e.stats().num_preemptions > 0


def test_preemption_does_not_touch_the_random_streams():
    params = [dataclasses.replace(SAMPLED, seed=s, max_tokens=20) for s in range(4)]
    prompts = [(s, 7, 9) for s in range(4)]
    roomy, tight = engine(SPECS["plain"], 100), engine(SPECS["plain"], 8)
    for e in (roomy, tight):
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            e.add_request(prompt, p, str(i))
    expected, got = run(roomy), run(tight)
    assert roomy.stats().num_preemptions == 0 < tight.stats().num_preemptions
    assert {k: r.outputs for k, (_, r) in got.items()} == {k: r.outputs for k, (_, r) in expected.items()}


def test_prefix_hits_are_counted_and_change_nothing():
    spec = SPECS["mixed widths"]
    prompt = tuple(range(30))
    with_cache, without = engine(spec, 60), engine(spec, 60, enable_prefix_caching=False)
    for e, cached in ((with_cache, 28), (without, 0)):
        for ending, expected in (((), 0), ((), cached), ((40,), cached)):
            request_id = e.add_request(prompt + ending, GREEDY)
            result = run(e)[request_id][1]
            assert result.outputs[0].token_ids == solo(spec, prompt + ending, GREEDY)
            assert result.num_cached_tokens == expected
    assert with_cache.stats().num_cached_tokens == 56
    assert with_cache.stats().prefix_hit_rate == pytest.approx(56 / 91)
    with_cache.clear_prefix_cache()
    with_cache.add_request(prompt, GREEDY)
    run(with_cache)
    assert with_cache.stats().num_cached_tokens == 56


def test_outputs_of_one_prompt_share_its_kv_blocks():
    e = engine(SPECS["plain"], 100)
    e.add_request(tuple(range(41)), dataclasses.replace(SAMPLED, n=4))
    e.step()
    stats = e.stats()
    assert stats.num_kv_blocks - stats.num_free_kv_blocks == 10 + 4  # ten full ones shared, an unfinished one each
    outputs = next(iter(run(e).values()))[1].outputs
    expected = [solo(SPECS["plain"], tuple(range(41)), SAMPLED, i) for i in range(4)]
    assert [o.token_ids for o in outputs] == expected
    assert len(set(expected)) == 4


def test_kv_bytes_are_those_of_the_spec():
    """A model that lost attention sub-layers holds more tokens in the same memory."""
    dense, pruned = plain_spec(4), mixed_spec(kinds="fafF")
    for spec in (dense, pruned):
        e = engine(spec, kv_memory=1 << 16)
        assert e.kv_cache_bytes == e.max_cached_tokens * spec.kv_bytes_per_token(4) <= 1 << 16
        assert e.kv_cache_bytes + 4 * spec.kv_bytes_per_token(4) > 1 << 16
    dropped = dataclasses.replace(dense, sublayers=dense.sublayers[1:])
    assert dropped.kv_bytes_per_token(4) == dense.kv_bytes_per_token(4) * 3 // 4
    tokens = [engine(s, kv_memory=96 << 10).max_cached_tokens for s in (dense, dropped)]
    assert tokens[0] * 4 == tokens[1] * 3
    assert engine(SPECS["FFN only"], kv_memory=0).kv_cache_bytes == 0


def test_an_aborted_prompt_frees_what_it_holds():
    e = engine(SPECS["plain"], 30, max_num_seqs=2, max_num_batched_tokens=8)
    e.add_request(tuple(range(60)), GREEDY, "long")
    e.add_request((1, 2), GREEDY, "short")
    e.step()
    assert e.stats().num_running == 1
    assert e.abort("long")
    assert not e.abort("long")
    assert not e.abort("unknown")
    results = run(e)
    assert [o.finish_reason for o in results["long"][1].outputs] == ["abort"]
    assert results["short"][1].outputs[0].token_ids == solo(SPECS["plain"], (1, 2), GREEDY)
    assert e.stats().num_free_kv_blocks == 30


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


def test_deltas_add_up_to_the_output(pico_runtime):
    params = SamplingParams(temperature=1.2, seed=2, max_tokens=30, n=2, stop=["e ", "ox"], logprobs=1)
    e = pico_runtime.engine(kv_memory=1 << 20)
    e.add_request("the quick brown", params, "r")
    text, logprobs = ["", ""], [(), ()]
    while e.has_unfinished():
        for delta in e.step():
            text[delta.output_index] += str(delta)
            logprobs[delta.output_index] += delta.logprobs
            result = delta.result
    assert text == [o.text for o in result.outputs]
    assert logprobs == [o.logprobs for o in result.outputs]
    assert result.prompt == "the quick brown"
    whole = pico_runtime.generate("the quick brown", params)[0]
    assert [o.token_ids for o in whole.outputs] == [o.token_ids for o in result.outputs]


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
        ({"max_num_seqs": 0}, "max_num_seqs: expected an integer >= 1"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens: expected an integer >= 9"),
        ({"max_waiting": 0}, "max_waiting"),
        ({"kv_block_size": 2.0}, "kv_block_size"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        engine(SPECS["plain"], **{"kv_block_size": 4, **options})


def test_memory_as_text_fraction_and_default():
    per_token = plain_spec(2).kv_bytes_per_token(4)
    for text, tokens in (("64KiB", 65536 // per_token), ("64 kB", 64000 // per_token // 4 * 4), ("65536", 256)):
        assert engine(plain_spec(2), kv_memory=text).max_cached_tokens == tokens
    full = 3 * (128 + 4)  # three contexts, a kv_block each to spare
    assert engine(plain_spec(2), kv_memory=0.1, max_num_seqs=3).max_cached_tokens == full
    assert engine(plain_spec(2), max_num_seqs=3).max_cached_tokens == full


def test_logits_are_computed_only_for_those_that_sample(monkeypatch, by_ops):
    spec = SPECS["plain"]
    rows = []
    plain = decoder(spec).logits
    monkeypatch.setattr(decoder(spec), "logits", lambda h: rows.append(h.shape[0]) or plain(h))
    e = engine(spec, 60, max_num_seqs=2, max_num_batched_tokens=10)
    e.add_request((1, 2, 3), GREEDY)
    e.add_request(tuple(range(30)), GREEDY)
    for _ in range(5):
        e.step()
    assert rows == [1, 1, 1, 2, 2]
    assert torch.is_inference_mode_enabled() is False
