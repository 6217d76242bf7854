"""Launch configurations of the tiled matrix products: pure functions of shape, alignment and compute capability."""

from __future__ import annotations

import functools
from dataclasses import dataclass

# Below this a product reads its weight once and is bound by that: the decode kernels' work, not a tile's.
MIN_TOKENS = 65

# Multiprocessors of the largest part of each capability: A100, H100, B200. Fewer tiles leave some of them idle.
_PROCESSORS = {8: 108, 9: 132, 10: 148}


@dataclass(frozen=True)
class GemmConfig:
    """One program's tile: rows of x, columns of each of gate and up, depth of a step; what shares and feeds it.

    group_rows: row tiles that run next to each other before the columns advance, so that both operands of the
    programs running at one time stay in L2.
    """

    block_rows: int
    block_columns: int
    block_depth: int
    group_rows: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_rows", "block_columns", "block_depth"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"GemmConfig: expected {name} a power of two >= 16, got {value}")
        if self.num_warps not in (1, 2, 4, 8, 16) or self.num_stages < 1 or self.group_rows < 1:
            raise ValueError(f"GemmConfig: expected 1 .. 16 warps, stages and group_rows >= 1, got {self}")

    def shared_bytes(self, element_size: int) -> int:
        """Of the operands in flight: a tile of x, of gate and of up for every stage."""
        rows = self.block_rows + 2 * self.block_columns
        return self.num_stages * rows * self.block_depth * element_size


# Largest first. The two float32 accumulators take 2 * rows * columns / (32 * warps) registers a thread, at most 128;
# with 128 x 128 and 8 warps sm_80, whose operands pass through registers, too, spills 120 bytes.
# All of a capability share their depth: the order of summation does not follow the number of tokens.
_SM90 = (GemmConfig(128, 128, 64, 8, 8, 4), GemmConfig(128, 64, 64, 8, 4, 4), GemmConfig(64, 64, 64, 8, 4, 4))
_SM80 = (GemmConfig(128, 64, 32, 8, 4, 4), GemmConfig(64, 64, 32, 8, 4, 4))
# Rows loaded element by element pass through registers on every capability: 64 deep they spill.
_UNALIGNED = GemmConfig(64, 64, 32, 8, 8, 2)
_INTERPRETED = GemmConfig(32, 16, 32, 2, 4, 2)  # small tiles, so that small shapes have several


@functools.lru_cache(maxsize=4096)
def gated_linear_config(
    shape: tuple[int, int, int],  # (T, C, F)
    aligned: bool,  # rows of x and weight start at multiples of 16 bytes
    capability: tuple[int, int],
) -> GemmConfig:
    """The largest tile of which there are enough to give every multiprocessor one, or the smallest."""
    if min(shape) < 1:
        raise ValueError(f"gated_linear: expected T, C and F >= 1, got {shape}")
    if capability == (0, 0):
        return _INTERPRETED
    if not aligned:
        return _UNALIGNED
    num_tokens, _, channels = shape
    candidates = _SM80 if capability < (9, 0) else _SM90
    processors = _PROCESSORS.get(capability[0], 132)
    for config in candidates:
        if -(-num_tokens // config.block_rows) * -(-channels // config.block_columns) >= processors:
            return config
    return candidates[-1]
