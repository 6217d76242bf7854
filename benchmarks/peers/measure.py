"""Rounds of bench_cpu.py: every process generates in turn, and the machine's limits are measured before every turn."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peers.processes import Worker, WorkerError
from peers.runtimes import Candidate, Files

CONTEXT = 1280  # positions that every runtime must hold at batch 1
BATCH = 8


@dataclass(frozen=True)
class Case:
    """Prompts generated from together and tokens of each. turns: in a round; the shorter, the more."""

    batch: int
    length: int
    turns: int = 1


CASES = {
    "decode1@32": Case(1, 32, turns=3),
    "decode1@1024": Case(1, 1024),
    "decode8": Case(BATCH, 32),
    "prefill512": Case(1, 512, turns=2),
}
CHECK_PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
CHECK_TOKENS = 16
SETTLE_SECONDS = 0.1  # thread pools spin for some milliseconds after their last work
BUFFER_BYTES = 1_100_000_000
MATMUL = 2048


@dataclass
class Measured:
    """A process and what it has shown so far. samples: by case, one value a turn."""

    candidate: Candidate
    worker: Worker
    settings: str
    check: list[int]
    samples: dict[str, list[float]] = field(default_factory=dict)
    idle_cpu: float = 0.0  # greatest share of a core used while others ran

    def add(self, what: str, value: float) -> None:
        self.samples.setdefault(what, []).append(value)


def skipped(who: str, reason: str) -> None:
    print(f"skipped: {who}: {reason}", file=sys.stderr, flush=True)


def split_groups(found: Sequence[Candidate]) -> list[list[Candidate]]:
    """One group, or where memory is too small dense models and our pruned ones, linked by ours."""
    needed = sum(c.weight_bytes * 1.3 + 5e8 for c in found) + BUFFER_BYTES
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if needed < available:
        return [list(found)] if found else []
    dense = [c for c in found if c.variant == "dense"]
    return [group for group in (dense, [c for c in found if c.runtime == "ours"]) if group]


def start(candidate: Candidate, files: Files, precision: str, threads: int, logs: Path) -> Measured:
    """A loaded worker; raises WorkerError."""
    for path in [candidate.path] if candidate.path.is_file() else candidate.path.iterdir():
        with path.open("rb") as file:  # into the page cache
            while file.read(1 << 24):
                pass
    log = logs / f"{candidate.label.replace(' ', '-')}-{precision}.log"
    worker = Worker(files.command(candidate.runtime), files.environment(candidate.runtime, threads), log)
    try:
        loaded = worker.ask("load", path=str(candidate.path), threads=threads, context=CONTEXT, batch=BATCH)
        check = worker.ask("run", prompts=[CHECK_PROMPT], tokens=CHECK_TOKENS)["tokens"][0]
    except WorkerError:
        worker.close()
        raise
    found = Measured(candidate, worker, loaded["settings"], check)
    found.add("load_s", loaded["load_s"])
    found.add("rss_mb", worker.resident_bytes() / 1e6)
    found.add("rss_baseline_mb", worker.baseline_bytes / 1e6)
    return found


class Machine:
    """Limits of the machine, measured beside the runtimes.

    samples: of every turn; read_model: those of reading the model's size by the case they stand beside. Memory that
    others use as well can change its speed within a minute.
    """

    def __init__(self, model_bytes: int) -> None:
        self._large = torch.ones(max(BUFFER_BYTES, model_bytes) // 4)
        self._model = self._large[: model_bytes // 4]
        # without AVX-512 float32 is the faster one in torch, and the limit
        dtype = torch.bfloat16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else torch.float32
        self._a = torch.randn(MATMUL, MATMUL, dtype=dtype)
        self._matmul = "matmul_bf16" if dtype == torch.bfloat16 else "matmul_fp32"
        self.samples: dict[str, list[float]] = {"read_large": [], "read_model": [], self._matmul: []}
        self.read_model: dict[str, list[float]] = {}

    def measure(self, case: str) -> None:
        def seconds(run: Callable[[], object]) -> float:
            taken = []
            for _ in range(3):  # a limit: the best counts
                begin = time.perf_counter()
                run()
                taken.append(time.perf_counter() - begin)
            return min(taken)

        values = {
            "read_large": self._large.nbytes / 1e9 / seconds(self._large.sum),
            "read_model": self._model.nbytes / 1e9 / seconds(self._model.sum),
            self._matmul: 2 * MATMUL**3 / 1e9 / seconds(lambda: self._a @ self._a),
        }
        for name, value in values.items():
            self.samples[name].append(value)
        self.read_model.setdefault(case, []).append(values["read_model"])


def prompts(case: str, number: int, vocab_size: int) -> list[list[int]]:
    """Token ids of turn `number`: fixed, other ones every turn."""
    shape = CASES[case]
    source = random.Random(f"{case} {number}")
    return [[source.randrange(100, vocab_size) for _ in range(shape.length)] for _ in range(shape.batch)]


def generate(one: Measured, running: Sequence[Measured], case: str, ids: list[list[int]], tokens: int) -> None:
    """One measured generation; also how busy the others were."""
    others = [m for m in running if m is not one]
    time.sleep(SETTLE_SECONDS)
    before = [m.worker.cpu_seconds() for m in others]
    result = one.worker.ask("run", prompts=ids, tokens=tokens)
    for other, used in zip(others, before, strict=True):
        other.idle_cpu = max(other.idle_cpu, (other.worker.cpu_seconds() - used - 0.02) / result["total_s"])
    if case == "prefill512":
        one.add(case, len(ids[0]) / result["first_s"])
        one.add("ttft512", result["first_s"])
    else:
        one.add(case, result["after"] / (result["total_s"] - result["first_s"]))


def measure(running: list[Measured], machine: Machine, vocab_size: int, tokens: int, args: argparse.Namespace) -> None:
    """All rounds, after a warm-up that is short but of every shape. Who fails leaves `running`."""

    def run(one: Measured, case: str, number: int) -> None:
        if number >= 0:
            count = 1 if case == "prefill512" else tokens
            generate(one, running, case, prompts(case, number, vocab_size), count)
        else:
            one.worker.ask("run", prompts=prompts(case, number, vocab_size), tokens=1 if case == "prefill512" else 3)

    def turn(case: str, number: int) -> None:
        if number >= 0:
            machine.measure(case)
        shift = number % max(1, len(running))  # nobody is always first
        for one in running[shift:] + running[:shift]:
            try:
                run(one, case, number)
            except WorkerError as error:
                skipped(one.candidate.label, str(error))
                one.worker.close()
                running.remove(one)

    for case in args.cases:
        turn(case, -1)
    for number in range(args.rounds):
        for case in args.cases:
            turns = CASES[case].turns
            for t in range(turns):
                turn(case, number * turns + t)
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)


def run_group(
    group: Sequence[Candidate], files: Files, tokens: int, precision: str, args: argparse.Namespace
) -> tuple[list[Measured], Machine]:
    running: list[Measured] = []
    torch.set_num_threads(args.threads)
    logs = args.work / "logs"
    logs.mkdir(exist_ok=True)
    try:
        for candidate in group:
            try:
                running.append(start(candidate, files, precision, args.threads, logs))
            except WorkerError as error:
                skipped(f"{candidate.label} {precision}", str(error))
        machine = Machine(max(c.weight_bytes for c in group))
        measure(running, machine, files.spec.vocab_size, tokens, args)
    finally:
        for one in running:
            one.worker.close()
    for one in running:
        if one.idle_cpu > 0.02:
            print(f"{one.candidate.label}: used {one.idle_cpu:.0%} of a core while idle", file=sys.stderr)
    return running, machine
