"""Launch configurations of attention: pure functions of shape, element size, capability and SM count."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from depthprune_runtime.kernels.launch import next_power_of_2

MAX_HEAD_DIM = 256
NO_WINDOW = 2**31 - 1  # the window, in tokens, of a query that sees all
# Tickets that a device's decode workspace holds; a split launch has no more (request, KV group) pairs than that.
MAX_TICKETS = 4096
_SM_COUNTS = {8: 108, 9: 132, 10: 148}  # A100, H100, B200
# A split is at most this long where that costs no idle programs: one long request must not run on one SM alone.
_LONG_SPLIT = 8192
_INTERPRETED = (0, 0)


@dataclass(frozen=True)
class AttentionConfig:
    """Tile of one program (block_m rows of queries, block_n keys), its warps and pipeline, and the splits of a context.

    block_m counts packed rows: the H / K query heads of a KV group, times tokens in prefill.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: int = 1
    min_tiles: int = 1  # tiles of block_n keys that a split takes at least

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"AttentionConfig: expected {name} a power of two, got {value}")
        for name in ("num_stages", "splits", "min_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"AttentionConfig: expected {name} >= 1, got {getattr(self, name)}")


def _check(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"attention: expected num_heads a multiple of num_kv_heads, got {num_heads}, {num_kv_heads}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention: expected head_dim in 1 .. {MAX_HEAD_DIM}, got {head_dim}")


def _stages(tiles: int, indirect: bool) -> int:
    """num_stages for which Triton's pipeline holds `tiles` tiles of K and of V, or one more where wgmma reads them.

    `indirect`: loads that depend on loads (keys on the block table) before a matrix product share the stages. With the
    usual 3 the pipeline would hold one tile and load nothing ahead; a test counts the buffers.
    """
    return 2 * tiles + 1 if indirect else tiles + 1


@functools.lru_cache(maxsize=256)
def prefill_config(
    num_heads: int, num_kv_heads: int, head_dim: int, element_size: int, paged: bool, capability: tuple[int, int]
) -> AttentionConfig:
    """Never a function of the tokens or requests: the tile sets the order of a row's sums."""
    _check(num_heads, num_kv_heads, head_dim)
    group = next_power_of_2(num_heads // num_kv_heads)
    if capability == _INTERPRETED:  # tiles so small that tests of few tokens have several
        return AttentionConfig(max(16, group), 16, 4, 1)
    if element_size == 4:  # full float32 products run on the plain units, from registers
        return AttentionConfig(max(32, group), 16, 8, 1)
    # Whatever tile is one step wider needs more than the 255 registers of a thread (Triton 3.6, 3.9).
    if capability >= (9, 0):
        block_m, block_n, tiles = (128, 64, 2) if head_dim <= 128 else (64, 32, 2)
    elif head_dim <= 128:
        block_m, block_n, tiles = 128, 64 if head_dim <= 64 else 32, 3
    else:
        block_m, block_n, tiles = 64, 16, 2
    return AttentionConfig(max(block_m, group), block_n, 8, _stages(tiles, indirect=paged))


def _splits(programs: int, tiles: int, block_n: int, sm_count: int) -> tuple[int, int]:
    """(splits, min_tiles) for `programs` (request, KV group) pairs of at most `tiles` tiles each."""
    if programs >= MAX_TICKETS:
        return 1, 1
    fill = -(-2 * sm_count // programs)  # two programs an SM hide each other's latency
    if programs < 2 * sm_count:
        return min(fill, tiles), 1
    # The device is full: only long contexts are split, by what SMs could run at once, so that the partial results
    # stay below 16 programs an SM whatever the batch.
    long = min(-(-tiles * block_n // _LONG_SPLIT), 16 * sm_count // programs)
    return max(1, long), max(1, _LONG_SPLIT // 4 // block_n)


@functools.lru_cache(maxsize=4096)
def decode_config(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_context: int,  # tokens that a row of the block tables can hold
    element_size: int,
    capability: tuple[int, int],
    sm_count: int = 0,  # 0: that of the capability
) -> AttentionConfig:
    """Splits follow static bounds alone, so that a captured launch serves every length up to `max_context`."""
    _check(num_heads, num_kv_heads, head_dim)
    if batch < 1 or max_context < 1:
        raise ValueError(f"decode: expected batch and max_context >= 1, got {batch} and {max_context}")
    group = num_heads // num_kv_heads
    # One query head needs no matrix product: 16 rows of which 15 are padding would only move K through shared memory.
    block_m = 1 if group == 1 else max(16, next_power_of_2(group))
    if capability == _INTERPRETED:
        return AttentionConfig(
            block_m, 16, 4, 1, *_splits(batch * num_kv_heads, -(-max_context // 16), 16, sm_count or 4)
        )
    # A tile of K is 8 KB at most: 4 loads of 16 bytes for each of 128 threads, and short contexts still split.
    block_n = max(16, min(32, 8192 // (next_power_of_2(head_dim) * element_size)))
    sm_count = sm_count or _SM_COUNTS.get(capability[0], 108)
    splits, min_tiles = _splits(batch * num_kv_heads, -(-max_context // block_n), block_n, sm_count)
    num_warps = 4 if block_m * next_power_of_2(head_dim) <= 8192 else 8  # float32 sums of 64 registers a thread
    return AttentionConfig(block_m, block_n, num_warps, _stages(3, indirect=block_m > 1), splits, min_tiles)
