"""Decode without the host between steps: the same outputs as step by step, on the CPU through the same ops."""

from __future__ import annotations

import numpy as np
import pytest
import random_decoder
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import mixed_spec, plain_spec
from torch.utils._python_dispatch import TorchDispatchMode

from depthprune_runtime import SamplingParams
from depthprune_runtime.engine import runner
from depthprune_runtime.engine.decode_paths import MAX_STEPS, DecodeBatch
from depthprune_runtime.engine.gpu_graphs import GpuGraphs
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.errors import InputError
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.steps.gpu import FusedStep, inert_state
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec

CPU = torch.device("cpu")


@pytest.fixture
def looped(monkeypatch):
    """Engines decode through the loop, as they do on a GPU."""
    monkeypatch.setattr(runner, "choose_path", GpuGraphs)


def finish(engine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for delta in engine.step():
            assert delta.error is None
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.check()
    return found


def qk_norm_spec() -> DecoderSpec:
    sublayers = [s for b in range(2) for s in (AttentionSpec(4, 2, 8, (b,), qk_norm=True), FFNSpec(48, (b,)))]
    return DecoderSpec(32, 64, 128, 1e-5, RopeSpec(), True, tuple(sublayers))


SPECS = {"plain": plain_spec(2), "mixed": mixed_spec(), "window": mixed_spec(window=6), "q/k-norm": qk_norm_spec()}
PROMPTS = [(3,), (5, 9, 2, 7, 11, 1, 8), tuple(range(2, 22)), (40, 41)]


@pytest.mark.parametrize("name", SPECS)
def test_tokens_are_those_of_single_steps(name, looped):
    engine = random_decoder.engine(SPECS[name], kv_blocks=64)
    lengths = [30, 9, 17, 1]
    for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        engine.add_request(
            list(prompt), SamplingParams(max_tokens=length, ignore_eos=True, temperature=0.0), request_id=str(i)
        )
    found = finish(engine)
    for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        alone = random_decoder.solo(
            SPECS[name], prompt, SamplingParams(max_tokens=length, ignore_eos=True, temperature=0.0)
        )
        assert tuple(found[str(i)]) == alone
    assert engine.stats().num_steps < 30 + len(PROMPTS)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_mix_of_requests_over_any_memory(data):
    """Stop tokens, samplers, late arrivals and preemption: what a request says does not depend on any of it."""
    spec = SPECS["mixed"]
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), "as on a GPU"):
            patch.setattr(runner, "choose_path", GpuGraphs)
        engine = random_decoder.engine(
            spec, kv_blocks=data.draw(st.integers(12, 40)), decode_steps=data.draw(st.integers(1, MAX_STEPS))
        )
    wanted = {}
    for i in range(data.draw(st.integers(1, 4))):
        prompt = tuple(data.draw(st.lists(st.integers(2, 63), min_size=1, max_size=12)))
        params = SamplingParams(
            max_tokens=data.draw(st.integers(1, 24)),
            temperature=data.draw(st.sampled_from([0.0, 0.0, 0.8])),
            top_k=data.draw(st.sampled_from([0, 0, 5])),
            seed=i,
            ignore_eos=True,
            stop_token_ids=tuple(data.draw(st.lists(st.integers(2, 63), max_size=12, unique=True))),
        )
        engine.add_request(list(prompt), params, request_id=str(i))
        wanted[str(i)] = (prompt, params)
        for _ in range(data.draw(st.integers(0, 2))):
            for delta in engine.step() if engine.has_unfinished() else []:
                wanted.setdefault(delta.request_id + "!", []).extend(delta.token_ids)
    rest = finish(engine)
    for i, (prompt, params) in [(k, v) for k, v in wanted.items() if "!" not in k]:
        alone = random_decoder.solo(spec, prompt, params)
        stops = [n for n, token in enumerate(alone) if token in params.stop_token_ids]
        expected = alone[: stops[0] + 1] if stops else alone
        assert tuple(wanted.get(i + "!", []) + rest.get(i, [])) == expected


def test_drawn_tokens_are_those_of_single_steps(looped):
    engine = random_decoder.engine(SPECS["plain"], kv_blocks=64)
    params = [SamplingParams(max_tokens=20, ignore_eos=True, temperature=t, seed=4) for t in (0.0, 0.7, 1.5)]
    for i, param in enumerate(params):
        engine.add_request(list(PROMPTS[i]), param, request_id=str(i))
    found = finish(engine)
    for i, param in enumerate(params):
        assert tuple(found[str(i)]) == random_decoder.solo(SPECS["plain"], PROMPTS[i], param)
    assert any(draws for _, _, draws in engine._runner._path._buckets)


def test_one_request_may_fail_alone(looped):
    spec = SPECS["plain"]
    engine = random_decoder.engine(spec, kv_blocks=32)
    step = engine._runner._path
    original = step.tokens
    step.tokens = lambda rows, steps: np.where(
        (np.arange(len(rows.ids)) == 1) & (len(rows.ids) == 3), -1, original(rows, steps)
    )
    for i in range(3):
        engine.add_request([5 + i], SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0), request_id=str(i))
    errors = {}
    while engine.has_unfinished():
        for delta in engine.step():
            if delta.finish_reason:
                errors[delta.request_id] = delta.error
        engine.check()
    assert errors["0"] is None and errors["2"] is None
    assert "logits are not finite" in errors["1"]


def loop_and_cache(spec):
    cache = KVCache(spec, 40, 4, CPU, torch.float32)
    for pair in cache.pairs:
        for part in pair or ():
            part.fill_(torch.nan)
    return GpuGraphs(random_decoder.decoder(spec), cache), cache


def test_rows_that_hold_no_request_write_nothing():
    loop, cache = loop_and_cache(SPECS["mixed"])
    tables = np.arange(9).reshape(3, 3)
    rows = DecodeBatch(np.array([3, 4, 5]), np.array([0, 0, 0]), tables, [[], [], []], [0.0] * 3)
    loop.tokens(rows, 5)  # a bucket of 4 rows
    for pair in cache.pairs:
        for part in pair or ():
            written = ~part.flatten(0, 1).isnan().flatten(1).any(1)
            expected = [t for r in range(3) for t in range(r * 12, r * 12 + 5)]
            assert written.nonzero()[:, 0].tolist() == expected


def test_a_stop_token_ends_the_writes_of_its_row():
    loop, cache = loop_and_cache(SPECS["plain"])
    free = loop.tokens(DecodeBatch(np.array([3]), np.array([0]), np.array([[0, 1, 2]]), [[]], [0.0]), 6)[:, 0]
    at = next(n for n in range(1, 6) if free[n] not in free[:n])
    loop, cache = loop_and_cache(SPECS["plain"])
    rows = DecodeBatch(np.array([3]), np.array([0]), np.array([[0, 1, 2]]), [[int(free[at])]], [0.0])
    assert loop.tokens(rows, 6)[: at + 1, 0].tolist() == free[: at + 1].tolist()
    keys = cache.pairs[0][0].flatten(0, 1)
    assert int((~keys.isnan().flatten(1).any(1)).sum()) == at + 1


class Launches(TorchDispatchMode):
    """Names of the ops that reach the dispatcher from outside; what a reference is made of is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(s in str(func) for s in ("view", "reshape", "split", "slice", "select", "detach")):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "most"), [("plain", 5), ("mixed", 5), ("q/k-norm", 6)])
def test_five_launches_a_block_and_four_a_step(name, most):
    """Every op of the step is one launch on a GPU; the graph captured there is counted by tests/gpu."""
    spec = SPECS[name]
    loop, _ = loop_and_cache(spec)
    bucket = loop._load(DecodeBatch(np.array([3]), np.array([0]), np.array([[0, 1]]), [[]], [0.0]))
    with torch.inference_mode(), Launches() as launches:
        bucket.replay()
    attentions = sum(isinstance(s, AttentionSpec) for s in spec.sublayers)
    assert len(launches.names) <= attentions * (most - 2) + (len(spec.sublayers) - attentions) * 2 + 4, launches.names


def test_logits_of_the_fused_step():
    """Against the decoder run whole, in float32."""
    for spec in SPECS.values():
        decoder = random_decoder.decoder(spec)
        loop, _ = loop_and_cache(spec)
        ids = [7, 21, 3, 50]
        for position, token in enumerate(ids):
            rows = DecodeBatch(np.array([token]), np.array([position]), np.array([[2, 0]]), [[]], [0.0])
            logits = loop.logits(rows).clone()
        with torch.inference_mode():
            hidden = decoder.hidden_states(torch.tensor(ids), packed([4], CPU))
            torch.testing.assert_close(logits[0], decoder.logits(hidden)[-1], rtol=1e-4, atol=1e-4)


def test_an_inert_state_and_the_ops_it_needs():
    spec = SPECS["q/k-norm"]
    decoder = random_decoder.decoder(spec)
    assert "rotary_kv_write" in FusedStep.ops_used(decoder)
    reason = FusedStep.refuses(random_decoder.decoder(SPECS["plain"]))  # the CPU has its own step
    assert reason is not None and reason.startswith("no CPU implementation of draw_tokens, ") and "norm_qkv" in reason
    assert inert_state(2, 3, CPU).block_tables.shape == (2, 3)


def test_errors():
    with pytest.raises(InputError, match="decode_steps: expected an integer >= 1, got 0"):
        random_decoder.engine(SPECS["plain"], decode_steps=0)
