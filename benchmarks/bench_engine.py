"""The engine under load, beside Transformers' continuous batching in the same run.

    python benchmarks/bench_engine.py WEIGHTS.gguf [--requests 48] [--loads 0.5,0.8,1.2] [--json] [--no-record]

Every request has a prompt of 16 to 128 and 16 to 96 new tokens (greedy, no end of sequence), bf16, all threads.

- offline: all requests at once; tokens per second of each candidate, rounds interleaved.
- batch: decode tokens per second of the engine with 1, 4, 16 and 64 requests at once.
- poisson: arrivals at a share of the engine's own offline throughput, the same times for each candidate; TTFT is from
  the arrival to the first token, inter-token from one token to the next.
- scheduler: seconds of a scheduler step with 256 running requests, without the model.
- squeeze: 256 requests with a KV cache for a tenth of them, fp32; all must end, none leak, those checked give the
  tokens that they give alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_decode import save_for_transformers, transformers_model
from common import append_rows, environment, interleaved, paired_ratio, print_json, spread

from depthprune_runtime import AsyncEngine, Runtime, SamplingParams, import_model

KV_MEMORY = "1GiB"
PEER_PAGES = 182  # of 256 tokens of 23,040 bytes: 1 GiB
Timed = tuple[float, list[float]]  # arrival and token times of a request, perf_counter seconds


@dataclass(frozen=True)
class Job:
    """One request: prompt ids and the number of new tokens."""

    prompt: list[int]
    tokens: int

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True)


def workload(count: int, seed: int = 0) -> list[Job]:
    draw = random.Random(seed)
    return [
        Job([draw.randrange(1000, 40000) for _ in range(draw.randint(16, 128))], draw.randint(16, 96))
        for _ in range(count)
    ]


def offline_ours(runtime: Runtime, jobs: Sequence[Job]) -> Callable[[], None]:
    def run() -> None:
        engine = runtime.engine(kv_memory=KV_MEMORY)
        for job in jobs:
            engine.add_request(job.prompt, job.params)
        done = 0
        while engine.has_unfinished():
            done += sum(len(d.token_ids) for d in engine.step())
        engine.close()
        assert done == sum(j.tokens for j in jobs)

    return run


class Peer:
    """Transformers' continuous batching over the same weights."""

    def __init__(self, folder: Path) -> None:
        import transformers
        from transformers import ContinuousBatchingConfig, GenerationConfig

        transformers.utils.logging.set_verbosity_error()

        self._model = transformers_model(folder)
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
        # as many tokens as ours has in KV_MEMORY: by default most of the machine's memory is taken and written
        pages = ContinuousBatchingConfig(num_blocks=PEER_PAGES)
        self._manager = self._model.init_continuous_batching(config, continuous_batching_config=pages)
        self._manager.start()

    def submit(self, name: str, job: Job) -> None:
        self._manager.add_request(
            job.prompt, request_id=name, max_new_tokens=job.tokens, record_timestamps=True, eos_token_id=-1
        )

    def collect(self, count: int) -> dict[str, list[float]]:
        """Token times (perf_counter seconds) of the next `count` finished requests."""
        found: dict[str, list[float]] = {}
        while len(found) < count:
            output = self._manager.get_result(timeout=1)
            if output is None:
                if not self._manager.is_running():
                    raise SystemExit("transformers' continuous batching stopped")
                continue
            if output.error is not None:
                raise SystemExit(f"transformers' continuous batching failed: {output.error}")
            if output.is_finished():
                found[output.request_id] = list(output.timestamps or [])
        return found

    def stop(self) -> None:
        self._manager.stop(block=True)


def offline_peer(peer: Peer, jobs: Sequence[Job]) -> Callable[[], None]:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        for i, job in enumerate(jobs):
            peer.submit(f"{calls}-{i}", job)
        times = peer.collect(len(jobs))
        assert all(len(times[f"{calls}-{i}"]) == job.tokens for i, job in enumerate(jobs))

    return run


def arrivals(count: int, per_second: float, seed: int = 1) -> list[float]:
    draw, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.expovariate(per_second)
        times.append(now)
    return times


async def _poisson_ours(runtime: Runtime, jobs: Sequence[Job], when: Sequence[float]) -> list[Timed]:
    engine = AsyncEngine(runtime.engine(kv_memory=KV_MEMORY))
    begin = time.perf_counter()

    async def one(job: Job, at: float) -> Timed:
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        times: list[float] = []
        async for delta in engine.generate(job.prompt, job.params):
            times += [time.perf_counter()] * len(delta.token_ids)
        return begin + at, times

    found = await asyncio.gather(*(one(j, t) for j, t in zip(jobs, when, strict=True)))
    await engine.close()
    return list(found)


def poisson_ours(runtime: Runtime, jobs: Sequence[Job], when: Sequence[float]) -> list[Timed]:
    """(arrival, token times) of every request."""
    return asyncio.run(_poisson_ours(runtime, jobs, when))


def poisson_peer(peer: Peer, jobs: Sequence[Job], when: Sequence[float]) -> list[Timed]:
    begin = time.perf_counter()
    for i, (job, at) in enumerate(zip(jobs, when, strict=True)):
        time.sleep(max(0.0, begin + at - time.perf_counter()))
        peer.submit(f"p{when[0]}-{i}", job)
    times = peer.collect(len(jobs))
    return [(begin + at, times[f"p{when[0]}-{i}"]) for i, at in enumerate(when)]


def latencies(found: Sequence[Timed]) -> dict[str, float]:
    first = [times[0] - arrival for arrival, times in found]
    between = [b - a for _, times in found for a, b in itertools.pairwise(times)]
    span = max(times[-1] for _, times in found) - min(arrival for arrival, _ in found)
    return {
        "tokens_per_s": sum(len(times) for _, times in found) / span,
        **{f"ttft_p{q}_ms": 1e3 * quantile(first, q) for q in (50, 90, 99)},
        **{f"itl_p{q}_ms": 1e3 * quantile(between, q) for q in (50, 90, 99)},
    }


def quantile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def batch_throughput(runtime: Runtime, sizes: Sequence[int], rounds: int) -> dict[int, float]:
    """Decode tokens per second by number of requests: prefill and its step left out."""

    def decode(count: int) -> float:
        engine = runtime.engine(kv_memory=KV_MEMORY)
        for job in workload(count, seed=2):
            engine.add_request(job.prompt[:16], SamplingParams(temperature=0, max_tokens=33, ignore_eos=True))
        while engine.stats().num_output_tokens < count:
            engine.step()
        start, before = time.perf_counter(), engine.stats().num_output_tokens
        while engine.has_unfinished():
            engine.step()
        taken = (engine.stats().num_output_tokens - before) / (time.perf_counter() - start)
        engine.close()
        return taken

    found: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            found[size].append(decode(size))
    return {size: statistics.median(values) for size, values in found.items()}


def scheduler_step(count: int = 256) -> float:
    """Median seconds of `schedule` with `count` requests decoding, the bookkeeping of a real engine around it."""
    from depthprune_runtime.engine.kv_blocks import KVBlockPool
    from depthprune_runtime.engine.request import Request
    from depthprune_runtime.engine.scheduler import Scheduler

    scheduler = Scheduler(KVBlockPool(count * 40, 16), count, 8192)
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    requests = [Request(f"r{i}", 0, range(100 + i % 7), params, frozenset(), 4096, None) for i in range(count)]
    scheduler.add(requests)
    seconds = []
    for _ in range(300):
        start = time.perf_counter()
        chunks = scheduler.schedule()
        seconds.append(time.perf_counter() - start)
        for chunk in chunks:
            if chunk.samples:
                chunk.request.append(7)
    return statistics.median(seconds[10:])


def squeeze(runtime: Runtime, count: int = 256, checked: int = 32) -> dict[str, Any]:
    """All requests with a tenth of the KV cache that they need together; `checked` of them also alone."""
    draw = random.Random(3)
    jobs = [
        Job([draw.randrange(1000, 40000) for _ in range(draw.randint(16, 64))], draw.randint(8, 24))
        for _ in range(count)
    ]
    alone = [runtime.generate([j.prompt], j.params)[0].outputs[0].token_ids for j in jobs[:checked]]
    every = sum(len(j.prompt) + j.tokens for j in jobs) * runtime.spec.kv_bytes_per_token(runtime.dtype.itemsize)
    engine = runtime.engine(kv_memory=every // 10, max_num_seqs=count)
    names = [engine.add_request(j.prompt, j.params) for j in jobs]
    start = time.perf_counter()
    tokens: dict[str, list[int]] = {name: [] for name in names}
    while engine.has_unfinished():
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
        engine.check()
    seconds = time.perf_counter() - start
    stats = engine.stats()
    assert stats.num_free_kv_blocks == stats.num_kv_blocks, "a kv_block leaked"
    assert all(len(tokens[n]) == j.tokens for n, j in zip(names, jobs, strict=True))
    return {
        "tokens_per_s": sum(j.tokens for j in jobs) / seconds,
        "preemptions": stats.num_preemptions,
        "differing": sum(tuple(tokens[n]) != a for n, a in zip(names, alone, strict=False)),
        "checked": checked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", default="0.5,0.8,1.2", help="arrivals, as shares of the offline throughput")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="do not append to benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_for_transformers(args.weights, Path(folder) / "hf")
        import_model(args.weights, Path(folder) / "dense.safetensors")
        rows = measure(args, Path(folder))
    if not args.no_record:
        append_rows("engine_cpu", rows)
    if args.json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row['test']:<24} {row['candidate']:<14} {row['value']:>12.3f} {row['unit']:<12} {row['note']}")


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    place = {"model": "SmolLM2-135M-Instruct bf16", **environment()}
    rows: list[dict[str, Any]] = []

    def add(test: str, candidate: str, value: float, unit: str, note: str = "") -> None:
        rows.append(
            {"test": test, "candidate": candidate, "value": round(value, 4), "unit": unit, "note": note, **place}
        )

    add("scheduler, 256 requests", "ours", 1e3 * scheduler_step(), "ms a step")
    runtime = Runtime.load(folder / "dense.safetensors")
    peer = Peer(folder / "hf")
    jobs = workload(args.requests)
    total = sum(j.tokens for j in jobs)
    seconds = interleaved(
        {"ours": offline_ours(runtime, jobs), "transformers": offline_peer(peer, jobs)}, rounds=args.rounds
    )
    for name, values in seconds.items():
        add("offline", name, total / spread(values)["median"], "tokens/s", f"{args.requests} requests at once")
    add("offline", "ratio", paired_ratio(seconds["transformers"], seconds["ours"]), "x", "median of rounds")
    throughput = total / spread(seconds["ours"])["median"]
    for load in [float(v) for v in args.loads.split(",")]:
        per_second = load * throughput / (total / len(jobs))
        when = arrivals(len(jobs), per_second)
        for name, found in (
            ("ours", poisson_ours(runtime, jobs, when)),
            ("transformers", poisson_peer(peer, jobs, when)),
        ):
            for key, value in latencies(found).items():
                unit = "ms" if key.endswith("_ms") else "tokens/s"
                add(f"poisson {load:g}: {key}", name, value, unit, f"{per_second:.2f} requests/s")
    peer.stop()
    by_size = batch_throughput(runtime, (1, 4, 16, 64), args.rounds)
    for size, value in by_size.items():
        add(f"decode, batch {size}", "ours", value, "tokens/s", f"{value / by_size[1]:.2f}x batch 1")
    exact = Runtime.load(folder / "dense.safetensors", dtype=torch.float32)
    found = squeeze(exact)
    note = f"{found['preemptions']} preemptions; {found['differing']} of {found['checked']} checked differ from alone"
    add("squeeze, 256 requests", "ours", found["tokens_per_s"], "tokens/s", note)
    return rows


if __name__ == "__main__":
    main()
