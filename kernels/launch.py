"""Launch configurations: a pure function of op, shape and compute capability, so that they can be tested and
compiled ahead of time without a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

MAX_HIDDEN_SIZE = 16384  # of the largest public models; float32 tiles of 32768 spill 64 bytes (sm_90)


@dataclass(frozen=True)
class LaunchConfig:
    """Rows and columns of one program's tile, powers of two, and the warps that share it."""

    block_rows: int
    block_size: int
    num_warps: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1 or value & (value - 1):
                raise ValueError(f"LaunchConfig: expected {name} a power of two, got {value}")
        if self.num_warps > 32:
            raise ValueError(f"LaunchConfig: expected at most 32 warps, got {self.num_warps}")


def _norm(shape: tuple[int, ...], capability: tuple[int, int]) -> LaunchConfig:
    """shape (T, C). A row is one tile: its statistics need no second pass and no atomics.

    The capability decides nothing here: a row is latency-bound on each of sm_80, 90 and 100.
    """
    del capability
    _, hidden_size = shape
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"norm: expected hidden_size in 1 .. {MAX_HIDDEN_SIZE}, got {hidden_size}")
    block_size = next_power_of_2(hidden_size)
    # Short rows (per-head norms) share a program: 512 values fill two warps. Never a function of T: the order of
    # summation follows the tile, and a token's result must not depend on the batch around it.
    block_rows = max(1, 512 // block_size)
    # 8 values a thread are one 16-byte load of bf16.
    num_warps = min(32, max(1, block_rows * block_size // (32 * 8)))
    return LaunchConfig(block_rows, block_size, num_warps)


_CONFIGS = {"rms_norm": _norm, "add_rms_norm": _norm}


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def launch_config(op: str, shape: tuple[int, ...], capability: tuple[int, int]) -> LaunchConfig:
    """The configuration of `op` at `shape` (each op says which letters) on a device of `capability`."""
    if op not in _CONFIGS:
        raise ValueError(f"launch_config: expected op in {sorted(_CONFIGS)}, got {op!r}")
    return _CONFIGS[op](shape, capability)


@functools.lru_cache(maxsize=64)
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) on the CPU, where Triton's interpreter runs the kernels."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.lru_cache(maxsize=64)
def sm_count_of(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 0 elsewhere: configurations then assume those of the capability."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
