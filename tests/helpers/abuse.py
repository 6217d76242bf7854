"""Random requests of every kind against one `AsyncEngine`: cancelled, aborted, left early, refused, too large.

One request after another streams beside them, watched: what the others do may not hold it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from depthprune_runtime import AsyncEngine, EngineFull, InputError, Runtime, SamplingParams

HUGE = 10**5000
WATCHED = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def _good(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    prompt = rng.choice(["the quick brown fox", "naïve 東京 🙂", [5, 6, 7], "a decoder is " * rng.randrange(1, 12)])
    options: dict[str, Any] = {"max_tokens": rng.randrange(1, 30)}
    if rng.random() < 0.5:
        options |= {"temperature": rng.choice([0, 1e-6, 0.7, 2.0, 1e4]), "seed": rng.randrange(2**64)}
    if rng.random() < 0.3:
        options |= {"top_p": rng.random() or 1.0, "top_k": rng.randrange(-1, 400), "min_p": rng.random()}
    if rng.random() < 0.3:
        options |= {"repetition_penalty": rng.choice([0.01, 0.9, 1.3, 100.0])}
    if rng.random() < 0.2:
        options |= {"logprobs": rng.randrange(21), "n": rng.randrange(1, 5)}
    if rng.random() < 0.3:
        options |= {"stop": ["e ", "ox"], "stop_token_ids": rng.sample(range(384), rng.choice([1, 20, 300]))}
    return prompt, options


_BAD: list[Callable[[random.Random], tuple[Any, dict[str, Any]]]] = [
    lambda rng: ("a", {rng.choice(["n", "top_k", "seed", "max_tokens", "logprobs"]): rng.choice([-2, 1.5, "3", True])}),
    lambda rng: ("a", {rng.choice(["temperature", "top_p", "min_p"]): rng.choice([float("nan"), -1, HUGE, "x", None])}),
    lambda rng: ("a", {"stop_token_ids": rng.choice([[2**63], [HUGE], [-1], [384], 5, "12", list(range(5000))])}),
    lambda rng: ("a", {"stop": rng.choice([5, [""], [5], ["\udcff"]])}),
    lambda rng: ("a", {"repetition_penalty": rng.choice([0, 1e-40, 1e40])}),
    lambda rng: ("a", {"n": rng.choice([129, 100_000, 2**70]), "repetition_penalty": 1.1}),
    lambda rng: (
        rng.choice([5, None, b"ab", [True], [1.0], [384], [2**70], [HUGE], [], "", {}, {"a": 1}, "\udcff"]),
        {},
    ),
    lambda rng: ("the quick brown fox " * 24_000, {}),
    lambda rng: ([5] * 256, {}),
    lambda rng: ([5] * 5000, {}),
]


def _many_stops(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    """Refused or served: both are answers."""
    return "the quick", {"stop": [f"{rng.random()}" for _ in range(3000)], "max_tokens": 5}


def _many_outputs(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    return [5, rng.randrange(384)], {"n": rng.choice([40, 128]), "max_tokens": 3, "repetition_penalty": 1.1}


class Abuse:
    """`requests` random requests, `together` of them at a time; `counts` by outcome."""

    def __init__(self, runtime: Runtime, requests: int, together: int = 24, seed: int = 0) -> None:
        self.engine = AsyncEngine(runtime.engine(kv_memory="4MiB", max_num_seqs=32, max_waiting=160))
        self.counts: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.gaps: list[float] = []  # seconds between deltas of the watched streams
        self.watched: list[tuple[int, ...]] = []  # the tokens of each
        self.memory: list[int] = []  # resident bytes, before and then after each tenth
        self._requests = requests
        self._together = together
        self._seed = seed

    async def run(self) -> None:
        gc.collect()
        gc.freeze()  # a collection of all modules would stop every thread for longer than any request may
        numbers = iter(range(self._requests))
        ended = asyncio.Event()
        watcher = asyncio.create_task(self._watch(ended))
        await asyncio.gather(*(self._caller(numbers) for _ in range(self._together)))
        ended.set()
        await watcher
        while (stats := await self.engine.stats()).num_running or stats.num_waiting:
            await asyncio.sleep(0.001)
        gc.unfreeze()

    async def _caller(self, numbers: Any) -> None:
        for number in numbers:
            rng = random.Random(f"{self._seed}/{number}")
            try:
                outcome = await self._one(rng, number)
            except Exception as error:
                outcome = f"unexpected {type(error).__name__}"
                self.unexpected.append(f"{number}: {error!r}"[:300])
            self.counts[outcome] += 1
            if number % max(1, self._requests // 10) == 0:
                self.memory.append(resident())

    async def _one(self, rng: random.Random, number: int) -> str:
        kind = rng.random()
        make = _good if kind < 0.6 else rng.choice(_BAD) if kind < 0.96 else rng.choice([_many_stops, _many_outputs])
        prompt, options = make(rng)
        priority = rng.choice([0, 0, 0, -(2**31), 2**31 - 1])
        if rng.random() < 0.02:
            priority = rng.choice([2**31, -HUGE, 0.5, True])
        request_id = rng.choice([None, None, f"request-{number}", str(number)])
        try:
            params = SamplingParams(**options)
            stream = await self.engine.submit(prompt, params, request_id, priority)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 400, str(error)
            return "refused"
        except EngineFull:
            return "full"
        return await self._follow(stream, rng)

    async def _follow(self, stream: Any, rng: random.Random) -> str:
        manner = rng.random()
        if manner < 0.15:  # leave after a few deltas
            for _ in range(rng.randrange(4)):
                await anext(stream, None)
            await stream.aclose()
            return "left"
        if manner < 0.3:  # end it from elsewhere
            await asyncio.sleep(rng.random() * 0.005)
            await self.engine.abort(stream.request_id)
        elif manner < 0.45:  # cancel whoever reads it
            task = asyncio.create_task(self._read(stream))
            await asyncio.sleep(rng.random() * 0.005)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                return "ended " + await task
            return "cancelled"
        return "ended " + await self._read(stream)

    async def _read(self, stream: Any) -> str:
        reasons = set()
        async for delta in stream:
            if delta.error is not None:
                self.unexpected.append(delta.error)
            if delta.finish_reason is not None:
                reasons.add(delta.finish_reason)
        return "/".join(sorted(reasons))

    async def _watch(self, ended: asyncio.Event) -> None:
        while not ended.is_set() or not self.watched:
            ids: tuple[int, ...] = ()
            last = None
            async for delta in await self._patiently():
                now = time.perf_counter()
                if last is not None and delta.token_ids:
                    self.gaps.append(now - last)
                last = now
                ids += delta.token_ids
            self.watched.append(ids)

    async def _patiently(self) -> Any:
        while True:
            with contextlib.suppress(EngineFull):
                return await self.engine.submit([7, 8, 9], WATCHED, priority=-5)
            await asyncio.sleep(0.005)

    def report(self) -> dict[str, Any]:
        gaps = sorted(self.gaps)
        median = statistics.median(gaps)
        return {
            "requests": self._requests,
            "outcomes": dict(sorted(self.counts.items())),
            "unexpected": self.unexpected[:20],
            "watched_streams": len(self.watched),
            "gap_seconds": {"median": median, "p99": gaps[int(len(gaps) * 0.99)], "longest": gaps[-1]},
            "longest_gap_in_medians": gaps[-1] / median,
            "resident_megabytes": [round(m / 1e6, 1) for m in self.memory],
            "growth_after_warm_up": self.memory[-1] / self.memory[min(2, len(self.memory) - 1)] - 1,
        }


def resident() -> int:
    """Resident bytes of this process; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.is_file() else 0


def leaks(abuse: Abuse) -> dict[str, int]:
    """What an idle engine still holds of requests that have ended: nothing, if all is well."""
    engine = abuse.engine._engine
    engine.check()
    pool = engine._pool
    return {
        "kv_blocks": pool.num_kv_blocks - pool.num_free,
        "samplers": len(engine._samplers._made),
        "groups": len(engine._groups),
        "news": len(engine._news),
        "streams": len(abuse.engine._streams),
        "seats": engine._scheduler.max_num_seqs - len(engine._scheduler._seats),
        "waiting": sum(not r.finished for _, r in engine._scheduler._waiting),
    }
