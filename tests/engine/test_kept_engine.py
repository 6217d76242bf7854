"""The engine that `generate`, `chat` and `stream` share: kept, grown, lent to one call at a time, and given back."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from depthprune_runtime import InputError, Runtime, SamplingParams
from depthprune_runtime.engine.engine import Engine
from depthprune_runtime.engine.runner import Runner

PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True, logprobs=2)
LONG = [(7 * i + 3) % 250 + 3 for i in range(60)]


@pytest.fixture
def runtime(pico_file):
    with Runtime.load(pico_file, device="cpu") as loaded:
        yield loaded


@pytest.fixture
def made(monkeypatch):
    """Weak references to every engine that is made."""
    found = []
    plain = Engine.__init__

    def counted(self, *args, **options):
        found.append(weakref.ref(self))
        plain(self, *args, **options)

    monkeypatch.setattr(Engine, "__init__", counted)
    return found


def told(outputs):
    return [(o.text, c.token_ids, c.logprobs, o.num_cached_tokens) for o in outputs for c in o.outputs]


def idle(runtime):
    """The kept engine has no request, and all its kv_blocks are free."""
    engine = runtime._kept._engine
    engine.check()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_kv_blocks) == (0, 0, stats.num_kv_blocks)
    return engine


def test_calls_share_an_engine_and_none_sees_the_one_before(pico_file, runtime, made):
    """Each output, with its log-probabilities to the last bit, is that of a model that was just loaded."""
    calls = (LONG, LONG, [5, 6, 7], [LONG, LONG[:40], LONG], [*LONG[:33], 9, 9, 9], LONG)
    fresh = []
    for prompts in calls:
        with Runtime.load(pico_file, device="cpu") as other:
            fresh.append(told(other.generate(prompts, PARAMS)))
    runtime.generate([LONG] * 3, PARAMS)
    made.clear()
    for prompts, expected in zip(calls, fresh, strict=True):
        assert told(runtime.generate(prompts, PARAMS)) == expected
        idle(runtime)
    assert [c.token_ids for c in runtime.stream(LONG, PARAMS)]
    runtime.chat([{"role": "user", "content": "the quick"}], PARAMS)
    assert not made


def test_the_cache_is_what_the_largest_call_can_use(runtime):
    per_block = 16 * runtime.spec.kv_bytes_per_token(runtime.dtype.itemsize)
    assert runtime.kv_cache_bytes == 0
    for prompts, blocks in (
        ([5, 6, 7], 2),  # 3 + 12 tokens, and a kv_block to spare
        (LONG, 6),  # 60 + 12
        ([5, 6, 7], 6),
        ([LONG, [5, 6, 7]], 8),
    ):
        runtime.generate(prompts, PARAMS)
        assert runtime.kv_cache_bytes == blocks * per_block


def test_prefixes_are_kept_if_asked_for(pico_file):
    with Runtime.load(pico_file, device="cpu", keep_prefixes=True) as runtime:
        first = runtime.generate(LONG, PARAMS)[0]
        again = runtime.generate(LONG, PARAMS)[0]
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 48)
        assert again.outputs[0].token_ids == first.outputs[0].token_ids
        idle(runtime)
    with pytest.raises(InputError, match="keep_prefixes: expected true or false, got 1"):
        Runtime.load(pico_file, device="cpu", keep_prefixes=1)


def test_a_stream_left_early_frees_its_requests(runtime, made):
    expected = told(runtime.generate([5, 6, 7], PARAMS))
    stream = runtime.stream([[5, 6, 7], [8, 9]], PARAMS)
    next(stream)
    runtime.close()  # the stream goes on with its cache, and gives it back at its end
    assert runtime.kv_cache_bytes > 0
    next(stream)
    stream.close()
    assert runtime.kv_cache_bytes == 0
    stream = runtime.stream([[5, 6, 7], [8, 9]], PARAMS)
    next(stream)
    made.clear()
    del stream
    gc.collect()
    idle(runtime)
    assert told(runtime.generate([5, 6, 7], PARAMS)) == expected
    assert not made


def test_a_call_inside_a_stream_has_an_engine_of_its_own(runtime, made):
    expected = told(runtime.generate([5, 6, 7], PARAMS))
    whole = [c.token_ids for c in runtime.stream(LONG, PARAMS)]
    made.clear()
    found = []
    for chunk in runtime.stream(LONG, PARAMS):
        found.append(chunk.token_ids)
        assert told(runtime.generate([5, 6, 7], PARAMS)) == expected
    assert found == whole
    gc.collect()
    assert len(made) == len(found)
    assert not any(ref() for ref in made), "an engine outlives its call"
    idle(runtime)


def test_threads_do_not_wait_for_each_other(runtime, monkeypatch):
    """Two calls meet in the middle: each waits in its step until the other is in one, too."""
    prompts = ([5, 6, 7], LONG)
    expected = [told(runtime.generate(p, PARAMS)) for p in prompts]
    both = threading.Barrier(2, timeout=60)
    plain, met, found = Runner.run, threading.local(), {}

    def run(self, chunks):
        if not getattr(met, "yet", False):
            met.yet = True
            both.wait()
        return plain(self, chunks)

    monkeypatch.setattr(Runner, "run", run)

    def call(number):
        found[number] = told(runtime.generate(prompts[number], PARAMS))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(2)] == expected
    idle(runtime)


@pytest.mark.parametrize("fault", [RuntimeError("device lost"), KeyboardInterrupt()])
def test_a_failed_step_does_not_break_the_next_call(runtime, monkeypatch, fault):
    expected = told(runtime.generate([5, 6, 7], PARAMS))

    def fail(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", fail)
        with pytest.raises(type(fault)):
            runtime.generate([5, 6, 7], PARAMS)
        assert runtime.kv_cache_bytes == 0
    assert told(runtime.generate([5, 6, 7], PARAMS)) == expected


def test_an_exception_between_steps_keeps_the_engine(runtime, made, monkeypatch):
    expected = told(runtime.generate([5, 6, 7], PARAMS))
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "has_unfinished", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runtime.generate([[5, 6, 7]] * 2, PARAMS)
    idle(runtime)
    made.clear()  # that call asked for more, so it made its own
    assert told(runtime.generate([5, 6, 7], PARAMS)) == expected
    assert not made


def test_closing_and_dropping_free_the_cache(pico_file, made):
    with Runtime.load(pico_file, device="cpu") as runtime:
        expected = told(runtime.generate([5, 6, 7], PARAMS))
        engine = made[-1]()
        tensors = [weakref.ref(t) for pair in engine._cache.pairs if pair is not None for t in pair]
        del engine
        assert tensors
    gc.collect()
    assert runtime.kv_cache_bytes == 0
    assert not any(ref() for ref in tensors)
    runtime.close()
    assert told(runtime.generate([5, 6, 7], PARAMS)) == expected, "the model is not closed"
    assert made[-1]() is not None
    del runtime
    gc.collect()
    assert made[-1]() is None
