"""The driver's side of a worker process: requests, resident memory and CPU time. Linux only (/proc)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """A worker refused a request or ended; the message is one line."""


class Worker:
    """One runtime with one model. log: file that gets what its libraries print."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(environment)
            )
        self.version: str = self._answer()["version"]
        self.baseline_bytes = self.resident_bytes()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise WorkerError(f"ended with status {self._process.returncode}: {last[0][:300]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says how it ended
        return self._answer()

    def resident_bytes(self) -> int:
        """Of the process and its children; pages that they share count once for each."""
        page = os.sysconf("SC_PAGE_SIZE")
        return sum(int((p / "statm").read_text().split()[1]) * page for p in self._family())

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        ticks = 0
        for folder in self._family():
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _family(self) -> list[Path]:
        """/proc folders of the process and its descendants."""
        found, parents = [], {self._process.pid}
        while parents:
            found += [Path("/proc") / str(pid) for pid in sorted(parents)]
            parents = {
                int(child)
                for folder in found[-len(parents) :]
                for children in folder.glob("task/*/children")
                for child in children.read_text().split()
            }
        return found

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
