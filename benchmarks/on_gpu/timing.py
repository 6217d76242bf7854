"""Timing on a GPU with events, on a CPU with the clock; and a budget of wall-clock time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # five times the L2 of an H100


class Budget:
    """Minutes that a run may take; nothing new begins after them."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def spent(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end


class Clock:
    """Seconds of calls on `device`, candidates in turn, round by round."""

    def __init__(self, device: torch.device, budget: Budget) -> None:
        self.device = device
        self._budget = budget
        self._gpu = device.type == "cuda"
        self._scratch = torch.zeros(FLUSH_BYTES if self._gpu else 1, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self._gpu:
            torch.cuda.synchronize(self.device)

    def rounds(
        self, candidates: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3
    ) -> dict[str, list[float]]:
        """Device time of each call, its operands not in L2; at least one round, fewer when the budget is spent.

        Overwriting the scratch buffer before each call empties L2, and keeps the GPU busy while the host prepares the
        launch: what is measured is the kernels, where a call does not wait for the device itself.
        """
        for _ in range(warmup):
            for run in candidates.values():
                run()
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for done in range(rounds):
            if done and self._budget.spent:
                break
            pending = {name: self._call(run) for name, run in candidates.items()}
            self.synchronize()
            for name, elapsed in pending.items():
                seconds[name].append(elapsed())
        return seconds

    def _call(self, run: Callable[[], Any]) -> Callable[[], float]:
        self._scratch.zero_()
        if not self._gpu:
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            return lambda: taken
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        return lambda: float(first.elapsed_time(last)) / 1e3


class TokenClock:
    """Tokens of one generation by the time at which the host had them.

    The rate leaves out everything up to the first `skip` tokens of each prompt: the prompt's own pass, and what
    compiled peers do at the beginning of every generation.
    """

    def __init__(self, batch: int, skip: int) -> None:
        self.start = time.perf_counter()
        self._batch = batch
        self._skip = skip
        self._ticks: list[tuple[float, int]] = []  # (time, tokens so far)

    def add(self, tokens: int) -> None:
        if tokens:
            self._ticks.append((time.perf_counter(), tokens + (self._ticks[-1][1] if self._ticks else 0)))

    @property
    def first_s(self) -> float:
        """Seconds until every prompt had a token."""
        return next(t for t, count in self._ticks if count >= self._batch) - self.start

    def rate(self, tokens: int) -> float:
        """Tokens a second; raises where not every prompt got `tokens`."""
        last, total = self._ticks[-1]
        if total != tokens * self._batch:
            raise RuntimeError(f"asked for {tokens} tokens of {self._batch} prompts, got {total}")
        # where the last burst brings the skipped ones too, all of it counts: it has no time in between
        earlier = self._ticks[:-1]
        begin, before = next((tick for tick in earlier if tick[1] >= self._skip * self._batch), earlier[-1])
        return (total - before) / (last - begin)
