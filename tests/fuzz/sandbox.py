"""Work in a forked child, within limits of processor time, wall time, memory and file size.

The child inherits a warm process. A fork copies its page tables, which takes longer than most pieces of work, so that a
child may do several in turn. The parent must never have computed on more than one thread: OpenMP does not survive a
fork.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import io
import logging
import os
import pickle
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU_SECONDS = 10
IDLE_SECONDS = (
    30  # without a report or a tenth of a second of processor time: for children that wait rather than compute
)
MEMORY = 1 << 30  # bytes above what the parent has
_FILE_SIZE = 1 << 28
_PACKAGE = "depthprune_runtime"
_OUTPUT_KEPT = 20_000  # bytes of what one piece of work printed
_LENGTH_BYTES = 8  # before each report in the pipe


@dataclass
class Report:
    """What became of one piece of work.

    end: "done", "error" (an exception), "signal", "hang" or "memory"; value: what the work returned; error: (type,
    message, innermost frame of the package, traceback) of an exception; printed: everything on stdout and stderr;
    warnings: messages of the package's log; grown: bytes by which its child has grown at most; seconds: of processor
    time.
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


def _used() -> float:
    """Processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def innermost(error: BaseException) -> str:
    """file:line of the last frame of `error` that lies in the package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}{_PACKAGE}{os.sep}" in f.filename]
    if not frames:
        return "outside the package"
    last = frames[-1]
    return f"{_PACKAGE}/{last.filename.rpartition(f'{os.sep}{_PACKAGE}{os.sep}')[2]}:{last.lineno}"


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is then an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_SIZE, _FILE_SIZE))
    address_space = _status("VmSize") + MEMORY + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))


def _is_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "not enough memory" in text


def _one(work: Callable[[], Any], lines: _Lines, output: int, size: int) -> Report:
    """What becomes of `work` here. size: least memory that the child has had."""
    os.ftruncate(output, 0)
    lines.lines, begin, report = [], _used(), Report()
    try:
        report.value = work()
    except BaseException as error:
        report.end = "memory" if _is_memory(error) else "error"
        with contextlib.suppress(MemoryError):
            trace = "".join(traceback.format_exception(error, limit=-12))[-6000:]
            report.error = (type(error).__name__, str(error), innermost(error), trace)
    report.grown = _status("VmHWM") - size
    if report.grown > MEMORY:
        report.end = "memory"
    report.warnings = lines.lines
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    report.printed = _printed(output)
    report.seconds = _used() - begin
    if report.seconds > CPU_SECONDS:  # the kernel's limit has whole seconds
        report.end = "hang"
    return report


def _printed(output: int) -> str:
    return os.pread(output, _OUTPUT_KEPT, 0).decode("utf-8", "backslashreplace")


def _child(works: Sequence[Callable[[], Any]], pipe: int, output: int) -> None:
    """Runs in the child, to its end: after the first piece of work that does not end well, no other begins."""
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
    size, hard = _status("VmRSS"), CPU_SECONDS * len(works) + 2
    with os.fdopen(pipe, "wb", closefd=False) as file:
        for work in works:
            resource.setrlimit(resource.RLIMIT_CPU, (round(_used()) + CPU_SECONDS, hard))
            size = min(size, _status("VmRSS"))  # what it gave back since must not hide what it takes
            report = _one(work, lines, output, size)
            data = pickle.dumps(report)
            file.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
            file.flush()
            if report.end != "done":
                break
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
                return data.getvalue(), True
            used = now
        else:
            part = os.read(pipe, 1 << 16)
            if not part:
                return data.getvalue(), False
            data.write(part)


def _received(data: bytes) -> list[Report]:
    """The reports in `data`, of which the last may be cut."""
    reports, place = [], 0
    while place + _LENGTH_BYTES <= len(data):
        begin = place + _LENGTH_BYTES
        place = begin + int.from_bytes(data[place:begin], "little")
        if place <= len(data):
            reports.append(pickle.loads(data[begin:place]))
    return reports


def _dead(status: int, late: bool, printed: str) -> Report:
    """A child that ended before it could report."""
    if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return Report("hang", printed=printed)
    if not os.WIFSIGNALED(status):
        return Report("signal", signal=-os.WEXITSTATUS(status), printed=printed)
    memory = "memory allocation of" in printed or "bad_alloc" in printed
    return Report("memory" if memory else "signal", signal=os.WTERMSIG(status), printed=printed)


def run_children(works: Sequence[Callable[[], Any]]) -> list[Report]:
    """Run `works` in turn in one forked child, whose values must be picklable.

    Returns:
        A report of each, up to and with the first that does not end well.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    output = os.memfd_create("output")
    fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)  # so that what is written after a truncation begins at zero
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            _child(works, writer, output)
        finally:
            os._exit(70)
    os.close(writer)
    try:
        data, late = _wait(pid, reader)
    finally:
        os.close(reader)
    _, status, usage = os.wait4(pid, 0)
    reports = _received(data)
    if os.WIFSIGNALED(status) and len(reports) == len(works):
        reports.pop()  # it died behind its last report
    if len(reports) < len(works) and (not reports or reports[-1].end == "done"):
        reports.append(_dead(status, late, _printed(output)))
        reports[-1].seconds = usage.ru_utime + usage.ru_stime - sum(r.seconds for r in reports)
    os.close(output)
    return reports


def run_child(work: Callable[[], Any]) -> Report:
    """Run `work` in a child of its own."""
    return run_children([work])[0]
