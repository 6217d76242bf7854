"""What every runtime of bench_cpu.py runs in a process of its own: requests on stdin, answers on stdout, JSON lines.

Standard library only: each worker runs in the virtual environment of its runtime.

    {"do": "load", "path": ..., "threads": 2, "context": 1280, "batch": 8}
        -> {"load_s": ..., "settings": ...}
    {"do": "run", "prompts": [[1, 2], ...], "tokens": 16}
        -> {"first_s": ..., "total_s": ..., "after": ..., "tokens": [[3, ...], ...]}

`first_s` is the time until every prompt has its first token, `after` how many tokens came between then and `total_s`.
A worker waits for its next request in a blocking read, so it takes no time from the others.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol


class Backend(Protocol):
    """A loaded model. settings: what was chosen for speed, in words."""

    settings: str

    def __init__(self, path: str, threads: int, context: int, batch: int) -> None: ...

    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]: ...


class Stopwatch:
    """Collects the tokens of one generation, greedy and of given length."""

    def __init__(self, prompts: int, tokens: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(prompts)]
        self._wanted = tokens
        self._after = 0
        self._first: float | None = None
        self._total = 0.0
        self._start = time.perf_counter()

    def add(self, new: list[tuple[int, list[int]]]) -> None:
        """Tokens of one step: (prompt, ids)."""
        if self._first is not None:
            self._after += sum(len(ids) for _, ids in new)
        for prompt, ids in new:
            self.tokens[prompt] += ids
        self._total = time.perf_counter() - self._start
        if self._first is None and all(self.tokens):
            self._first = self._total

    @property
    def unfinished(self) -> bool:
        return any(len(ids) < self._wanted for ids in self.tokens)

    def result(self) -> dict[str, Any]:
        lengths = {len(ids) for ids in self.tokens}
        if lengths != {self._wanted}:
            raise RuntimeError(f"asked for {self._wanted} tokens a prompt, got {sorted(lengths)}")
        return {"first_s": self._first, "total_s": self._total, "after": self._after, "tokens": self.tokens}


def serve(make: Callable[[str, int, int, int], Backend], version: str) -> None:
    """Answer requests until stdin closes. What libraries print on stdout goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        channel.write(json.dumps(answer) + "\n")

    send({"version": version})
    backend: Backend | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request.pop("do") == "load":
                start = time.perf_counter()
                backend = make(request["path"], request["threads"], request["context"], request["batch"])
                send({"load_s": time.perf_counter() - start, "settings": backend.settings})
            else:
                assert backend is not None
                send(backend.run(request["prompts"], request["tokens"]))
        except Exception as error:  # the driver reports it and goes on without this runtime
            send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
