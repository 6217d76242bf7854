"""A server in a process of its own, as users start it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator


class ServerProcess:
    """`depthprune serve` with a free port. url: where it listens."""

    def __init__(self, *arguments: str, code: str | None = None, **environment: str) -> None:
        command = [sys.executable, "-m", "depthprune_runtime.cli"] if code is None else [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            [*command, "serve", *arguments, "--port", "0", "--device", "cpu", "--kv-memory", "4MiB"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.said = ""
        for line in self.process.stderr or ():
            self.said += line
            if "serving" in line:
                break
        else:
            raise AssertionError(f"the server has ended: {self.said}")
        self.url = line.split(" on ")[1].strip()

    def end(self) -> int:
        """SIGTERM, and the status that it ends with."""
        if self.process.poll() is None:
            self.process.terminate()
        self.said += self.process.communicate(timeout=300)[1]
        return self.process.returncode


@contextlib.contextmanager
def server(*arguments: str, **options: str) -> Iterator[ServerProcess]:
    """A server that is ended behind its use, whatever happens."""
    started = ServerProcess(*arguments, **options)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()
