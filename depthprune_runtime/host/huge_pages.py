"""Tensors in huge pages: a decode step reads every weight once, and with pages of 4 KiB the processor spends much of
that time finding them.

Linux gives a mapped file no huge pages, so weights are copied once into anonymous memory that asks for them.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch
from torch import Tensor

_PAGE = 2 << 20  # bytes
_ALIGNMENT = 64  # a cache line, and the widest SIMD register
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages_available() -> bool:
    """Whether the system gives huge pages to memory that asks for them."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _SETTING.read_text()
    except OSError:
        return False


class HugePages:
    """One region of at most `nbytes`, handed out in order; of plain pages where the system gives no huge ones.

    Its memory is freed with the last tensor in it.
    """

    def __init__(self, nbytes: int) -> None:
        if not huge_pages_available():
            self._bytes = torch.zeros(max(1, nbytes) + _PAGE, dtype=torch.uint8)
            self._next = -self._bytes.data_ptr() % _PAGE
            return
        # private: the default is shared memory, whose huge pages are another setting
        region = mmap.mmap(-1, max(1, nbytes) + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
        self._next = -ctypes.addressof(ctypes.c_char.from_buffer(region)) % _PAGE
        self._bytes = torch.frombuffer(region, dtype=torch.uint8)

    @staticmethod
    def room(tensor_bytes: int) -> int:
        """What a tensor of that size takes of the region."""
        return -(-tensor_bytes // _ALIGNMENT) * _ALIGNMENT

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in the region, not initialised beyond zeros."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if self._next + nbytes > self._bytes.numel():
            raise AssertionError(f"{nbytes} bytes do not fit into what is left of {self._bytes.numel()}")
        out = self._bytes[self._next : self._next + nbytes].view(dtype).view(shape)
        self._next += self.room(nbytes)
        return out

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor in the region."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
