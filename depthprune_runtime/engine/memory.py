"""How much memory the KV cache may take: `kv_memory` as users give it, in bytes and kv_blocks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import DecoderSpec

KVMemory = int | float | str
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_EXPECTED = "bytes (2147483648 or '2GiB') or a fraction in (0, 1] of the device's free memory"


def default_kv_memory(device: torch.device) -> float:
    """A GPU is ours; the memory of a CPU is shared with everything else."""
    return 0.5 if device.type == "cpu" else 0.9


def free_memory(device: torch.device) -> int | None:
    """Bytes that `device` could still give, on a CPU within its control group's limit; None if it does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # counts what the page cache would give back
        available = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
        found = [int(available[1]) * 1024] if available else found
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        found.append(max(0, int(text) - int(used.read_text())))
    return min(found)


def kv_bytes(memory: KVMemory, device: torch.device) -> int:
    """Bytes that `memory` stands for."""
    if isinstance(memory, str):
        match = _SIZE.fullmatch(memory)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise InputError(f"kv_memory: expected {_EXPECTED}, got {memory!r}")
        return int(float(match[1]) * unit)
    if isinstance(memory, float) and 0.0 < memory <= 1.0:
        free = free_memory(device)
        if free is None:
            raise InputError(f"kv_memory: device {device} does not tell its free memory; give bytes, such as '2GiB'")
        return int(memory * free)
    if isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0:
        return memory
    raise InputError(f"kv_memory: expected {_EXPECTED}, got {memory!r}")


def kv_block_bytes(spec: DecoderSpec, kv_block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one kv_block over all attention sub-layers; 0 for a model without attention."""
    return kv_block_size * spec.kv_bytes_per_token(dtype.itemsize)


def num_kv_blocks(memory: int, spec: DecoderSpec, kv_block_size: int, dtype: torch.dtype, most: int) -> int:
    """kv_blocks that fit into `memory` bytes, at most `most`."""
    size = kv_block_bytes(spec, kv_block_size, dtype)
    count = most if size == 0 else min(most, memory // size)
    if count < 1:
        raise InputError(
            f"kv_memory: expected at least {size} bytes, the size of one kv_block ({kv_block_size} tokens), "
            f"got {memory}; raise it"
        )
    return count
