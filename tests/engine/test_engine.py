"""The engine: every request gets what it would get alone, nothing leaks, one bad request harms no other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from engine_runs import GREEDY, KINDS, SAMPLED, SPECS, collect, run
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from random_decoder import decoder, engine, solo
from specs import mixed_spec, plain_spec

from depthprune_runtime import SamplingParams
from depthprune_runtime.engine import runner
from depthprune_runtime.engine.decode_paths import OpByOp
from depthprune_runtime.engine.errors import EngineFull

BEGINNINGS = [(5,) * 11, tuple(range(20, 33)), (1, 2, 3)]


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


@pytest.fixture
def by_ops(monkeypatch):
    """Every step goes through the decoder's methods, which a test may then replace."""
    monkeypatch.setattr(runner, "choose_path", OpByOp)


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
