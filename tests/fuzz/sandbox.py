"""One piece of work in a forked child, within limits of processor time, wall time, memory and file size.

The child inherits a warm process, so a fork costs milliseconds. The parent must never have computed on more than one
thread: OpenMP does not survive a fork.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import pickle
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU_SECONDS = 10
IDLE_SECONDS = 30  # without a tenth of a second of processor time: for children that wait rather than compute
MEMORY = 1 << 30  # bytes above what the parent has
_FILE_SIZE = 1 << 28
_PACKAGE = "depthprune_runtime"
_OUTPUT_KEPT = 20_000  # bytes of what a child printed


@dataclass
class Report:
    """What became of a child.

    end: "done", "error" (an exception), "signal", "hang" or "memory"; value: what the work returned; error: (type,
    message, innermost frame of the package, traceback) of an exception; printed: everything on stdout and stderr;
    warnings: messages of the package's log; grown: bytes of memory above the parent's; seconds: of processor time.
    """

    end: str = "done"
    value: Any = None
    error: tuple[str, str, str, str] | None = None
    printed: str = ""
    warnings: list[str] = field(default_factory=list)
    grown: int = 0
    seconds: float = 0.0
    signal: int = 0


class _Lines(logging.Handler):
    """Collects messages of at least WARNING."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def innermost(error: BaseException) -> str:
    """file:line of the last frame of `error` that lies in the package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}{_PACKAGE}{os.sep}" in f.filename]
    if not frames:
        return "outside the package"
    last = frames[-1]
    return f"{_PACKAGE}/{last.filename.rpartition(f'{os.sep}{_PACKAGE}{os.sep}')[2]}:{last.lineno}"


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is then an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_SIZE, _FILE_SIZE))
    address_space = _status("VmSize") + MEMORY + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))


def _is_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "not enough memory" in text


def _child(work: Callable[[], Any], pipe: int, output: int) -> None:
    """Runs in the child, to its end."""
    os.setpgid(0, 0)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGXCPU, sys.stderr, all_threads=False, chain=True)
    lines = _Lines()
    logging.getLogger(_PACKAGE).addHandler(lines)
    _limit()
    start = _status("VmRSS")
    resource.getrusage(resource.RUSAGE_SELF)
    report = Report()
    try:
        report.value = work()
    except BaseException as error:
        report.end = "memory" if _is_memory(error) else "error"
        with contextlib.suppress(MemoryError):
            trace = "".join(traceback.format_exception(error, limit=-12))[-6000:]
            report.error = (type(error).__name__, str(error), innermost(error), trace)
    report.grown = _status("VmHWM") - start
    report.warnings = lines.lines
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with os.fdopen(pipe, "wb", closefd=False) as file:
        pickle.dump(report, file)
    os._exit(0)


def _cpu_seconds(pid: int) -> float:
    """Processor time of a running child."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wait(pid: int, pipe: int) -> tuple[bytes, bool]:
    """What the child wrote before its end, and whether it had to be killed because it did nothing any more."""
    data = io.BytesIO()
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    used = 0.0
    while True:
        if not poll.poll(IDLE_SECONDS * 1000):
            now = _cpu_seconds(pid)
            if now < used + 0.1:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                return b"", True
            used = now
        else:
            part = os.read(pipe, 1 << 16)
            if not part:
                return data.getvalue(), False
            data.write(part)


def run_child(work: Callable[[], Any]) -> Report:
    """Run `work` in a forked child. Its value must be picklable."""
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    output = os.memfd_create("output")
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            _child(work, writer, output)
        finally:
            os._exit(70)
    os.close(writer)
    try:
        data, late = _wait(pid, reader)
    finally:
        os.close(reader)
    _, status, usage = os.wait4(pid, 0)
    os.lseek(output, 0, os.SEEK_SET)
    with os.fdopen(output, "rb") as file:
        printed = file.read(_OUTPUT_KEPT).decode("utf-8", "backslashreplace")
    report = pickle.loads(data) if data and not os.WIFSIGNALED(status) else Report("signal")
    if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        report = Report("hang")
    elif os.WIFSIGNALED(status):
        report = Report("signal", signal=os.WTERMSIG(status))
        if "memory allocation of" in printed or "bad_alloc" in printed:
            report.end = "memory"
    elif not data:
        report = Report("signal", signal=-os.WEXITSTATUS(status))
    report.printed, report.seconds = printed, usage.ru_utime + usage.ru_stime
    if report.end != "hang" and report.grown > MEMORY:
        report.end = "memory"
    return report
