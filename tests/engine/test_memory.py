"""Memory beside weights and KV cache."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest

from depthprune_runtime.engine.memory import return_free_heap


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_free_heap_goes_back_to_the_system():
    # each from malloc, since Python's own arenas end at 512 bytes; the last one pins the top of the heap
    pieces = [bytes([i % 256]) * 2000 for i in range(20_000)]
    last = pieces[-1]
    before = resident()
    pieces.clear()
    return_free_heap()
    assert before - resident() > 30e6
    assert len(last) == 2000


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    return_free_heap()
