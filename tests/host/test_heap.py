"""The C heap after a tokenizer was parsed."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest

from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.host.heap import return_free_heap
from depthprune_runtime.text.tokenizer import Tokenizer


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
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", asked.append)  # gives None, which has no such function
    return_free_heap()
    assert asked == [None]


def test_a_tokenizer_gives_back_what_its_parser_left(pico_file, monkeypatch):
    calls = []
    monkeypatch.setattr("depthprune_runtime.text.tokenizer.return_free_heap", lambda: calls.append(True))
    Tokenizer(open_checkpoint(pico_file))
    assert calls == [True]
