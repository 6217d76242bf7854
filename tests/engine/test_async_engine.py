"""Many callers on one engine: cancellation, shutdown, exceptions, and that nobody is left hanging."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading

import pytest
from random_decoder import decoder, engine, solo
from specs import plain_spec

from depthprune_runtime import InputError, SamplingParams
from depthprune_runtime.engine import runner
from depthprune_runtime.engine.async_engine import AsyncEngine
from depthprune_runtime.engine.decode_paths import OpByOp
from depthprune_runtime.engine.errors import EngineDead, EngineFull

SPEC = plain_spec(2)
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LONG = dataclasses.replace(PARAMS, max_tokens=100)


def run(scenario, **options):
    """`scenario(engine)` against a fresh engine, which is closed afterwards; no thread may stay.

    It decodes step by step unless asked: in bursts, LONG outputs end before anybody could abort them.
    """

    async def main():
        owner = AsyncEngine(engine(SPEC, **{"kv_blocks": 200, "decode_steps": 1, **options}))
        try:
            return await asyncio.wait_for(scenario(owner), 60)
        finally:
            await owner.close()

    before = threading.active_count()
    try:
        return asyncio.run(main())
    finally:
        assert not [t for t in threading.enumerate() if t.name == "depthprune-engine"], before


async def tokens(owner, prompt, params=PARAMS, **options) -> tuple[int, ...]:
    ids: tuple[int, ...] = ()
    async for delta in owner.generate(prompt, params, **options):
        ids += delta.token_ids
    assert delta.finished
    return ids


async def last(stream):
    """The delta that ends it."""
    return [delta async for delta in stream][-1]


async def idle(owner) -> None:
    """Wait until nothing runs; nothing may be held then."""
    while (stats := await owner.stats()).num_running or stats.num_waiting:
        await asyncio.sleep(0.001)
    assert stats.kv_usage == 0.0


@pytest.mark.parametrize("decode_steps", [1, 8])
def test_many_callers_get_what_they_would_get_alone(decode_steps):
    prompts = [tuple(range(i, i + 3 + i % 5)) for i in range(20)]

    async def scenario(owner):
        found = await asyncio.gather(*(tokens(owner, p) for p in prompts))
        await idle(owner)
        return found

    found = run(scenario, max_num_seqs=6, decode_steps=decode_steps)
    assert found == [solo(SPEC, p, PARAMS) for p in prompts]


def test_refusals_come_to_their_caller():
    async def scenario(owner):
        with pytest.raises(InputError, match="below 64"):
            await tokens(owner, (99,))
        first = await owner.submit((1,), LONG, request_id="a")
        with pytest.raises(InputError, match="'a' is in use"):
            await owner.submit((1,), LONG, request_id="a")
        with pytest.raises(EngineFull):
            await asyncio.gather(*(owner.submit((1,), LONG) for _ in range(8)))
        first.abort()
        assert await owner.abort("unknown") is False

    run(scenario, max_num_seqs=1, max_waiting=2)


def test_a_cancelled_consumer_frees_its_request():
    async def scenario(owner):
        started = asyncio.Event()

        async def consume():
            async for _ in owner.generate((1, 2), LONG):
                started.set()

        task = asyncio.create_task(consume())
        other = asyncio.create_task(tokens(owner, (3, 4)))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await other == solo(SPEC, (3, 4), PARAMS)
        await idle(owner)
        assert (await owner.stats()).num_output_tokens < 20 + 100

    run(scenario)


def test_leaving_the_iteration_aborts_the_request():
    async def scenario(owner):
        async with contextlib.aclosing(owner.generate((1, 2), LONG)) as deltas:
            async for _ in deltas:
                break
        stream = await owner.submit((1, 2), LONG)
        await anext(stream)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await idle(owner)
        assert (await owner.stats()).num_output_tokens < 200

    run(scenario)


def test_an_abort_ends_the_stream_with_its_reason():
    async def scenario(owner):
        stream = await owner.submit((1, 2), LONG, request_id="mine")
        await anext(stream)
        assert await owner.abort("mine")
        return await last(stream)

    end = run(scenario)
    assert (end.finish_reason, end.finished) == ("abort", True)
    ids = end.result.outputs[0].token_ids
    assert ids == solo(SPEC, (1, 2), LONG)[: len(ids)]


def test_closing_ends_what_runs_and_refuses_what_comes():
    async def scenario(owner):
        streams = [await owner.submit((i,), LONG) for i in range(5)]
        await owner.close()
        ends = [(await last(s)).finish_reason for s in streams]
        with pytest.raises(EngineDead, match="closed"):
            await owner.submit((1,), PARAMS)
        assert owner.errored is not None
        await owner.close()
        return ends

    assert set(run(scenario, max_num_seqs=2)) <= {"abort", "length"}


def test_closing_can_wait_for_what_runs():
    async def scenario(owner):
        streams = [await owner.submit((i,), PARAMS) for i in range(4)]
        await owner.close(drain=True)
        return [(await last(s)).result.outputs[0].token_ids for s in streams]

    assert run(scenario, max_num_seqs=2) == [solo(SPEC, (i,), PARAMS) for i in range(4)]


def test_an_exception_of_the_engine_reaches_every_consumer(monkeypatch):
    fault = RuntimeError("device lost")
    plain, calls = decoder(SPEC).hidden_states, []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) > 6:
            raise fault
        return plain(*args, **options)

    monkeypatch.setattr(decoder(SPEC), "hidden_states", fail)
    monkeypatch.setattr(runner, "choose_path", OpByOp)  # every step goes through the decoder's methods

    async def scenario(owner):
        ends = await asyncio.gather(*(tokens(owner, (i,), LONG) for i in range(5)), return_exceptions=True)
        with pytest.raises(EngineDead, match="device lost") as caught:
            await tokens(owner, (1,))
        assert caught.value.__cause__ is fault
        return ends

    ends = run(scenario, max_num_seqs=2)
    assert all(isinstance(e, EngineDead) and e.__cause__ is fault for e in ends)
    assert len(ends) == 5


def test_calls_from_several_loops_and_threads():
    owner = AsyncEngine(engine(SPEC, 200))
    found = {}

    def caller(i):
        found[i] = asyncio.run(tokens(owner, (i, 9)))

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    owner.shutdown()
    assert found == {i: solo(SPEC, (i, 9), PARAMS) for i in range(6)}


def test_a_loop_that_ends_before_its_requests_holds_nothing():
    owner = AsyncEngine(engine(SPEC, 200))

    async def leave():
        await owner.submit((1, 2), LONG)

    asyncio.run(leave())

    assert asyncio.run(tokens(owner, (3,))) == solo(SPEC, (3,), PARAMS)
    asyncio.run(idle(owner))
    owner.shutdown()
