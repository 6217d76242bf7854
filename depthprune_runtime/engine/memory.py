"""How much memory the KV cache may take: `kv_memory` in bytes and kv_blocks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from depthprune_runtime.engine.options import KVMemory
from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import DecoderSpec


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


def kv_bytes(memory: KVMemory | None, device: torch.device) -> int:
    """Bytes that `kv_memory`, as `EngineOptions` keeps it, stands for; None is the device's default."""
    assert not isinstance(memory, str), "EngineOptions makes bytes of text"
    if isinstance(memory, int):
        return memory
    free = free_memory(device)
    if free is None:
        raise InputError(f"kv_memory: device {device} does not tell its free memory; give bytes, such as '2GiB'")
    return int((default_kv_memory(device) if memory is None else memory) * free)


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
