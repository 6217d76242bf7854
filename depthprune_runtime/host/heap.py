"""Giving memory back: parsing a tokenizer frees many times its file's size in small pieces, loading weights some MB,
and the C heap would keep them for good."""

from __future__ import annotations

import ctypes
import os


def return_free_heap() -> None:
    """Give the system what the C heap holds free, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
