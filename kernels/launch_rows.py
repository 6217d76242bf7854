"""Launch configurations of the decode projections (`rows`): pure functions of shape and compute capability."""

from __future__ import annotations

import functools
from dataclasses import dataclass

MAX_TOKENS = 64  # above it a GEMM library is the better choice
_VECTOR_TOKENS = 4  # up to here every weight meets its tokens in ordinary float32 lanes, above in the matrix units
_SMS = {8: 108, 9: 132, 10: 148}  # streaming multiprocessors of A100, H100, B200


@dataclass(frozen=True)
class RowsConfig:
    """One program's tile of weights, [block_n, block_k] values, against `block_t` tokens.

    block_k: inputs, or 32-bit words of a quantised row; use_dot: matrix units; stages: tiles in flight.
    """

    block_t: int
    block_n: int
    block_k: int
    use_dot: bool
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=4096)
def rows_config(num_tokens: int, rows: int, columns: int, bits: int, capability: tuple[int, int]) -> RowsConfig:
    """For `num_tokens` tokens and a weight [rows, columns] of `bits` bits (32, 16; 8 and 4: quantised)."""
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"rows: expected 1 to {MAX_TOKENS} tokens, got {num_tokens}")
    sms = _SMS.get(capability[0], 132)
    use_dot = num_tokens > _VECTOR_TOKENS
    block_t = _power_of_2(num_tokens) if not use_dot else max(16, _power_of_2(num_tokens))
    # Two programs on every multiprocessor at least, or the last ones run alone. Quantised panels have 16 rows.
    block_n = 32 if use_dot and rows >= 64 * sms and bits > 8 else 16
    if bits > 8:
        block_k = _dense_columns(block_t, use_dot, bits)
    else:
        # words: 32 / bits codes each, unrolled one after another; their inputs share the tile of words
        block_k = 32 if use_dot or block_t > 2 else 64
        columns = -(-columns * bits // 32)
    block_k = min(block_k, max(16, _power_of_2(columns)))
    # Up to 2 warps a tile of few inputs: 8 values of a thread are one 16-byte load.
    num_warps = 4 if use_dot else min(4, max(1, block_n * block_k // 256))
    return RowsConfig(block_t, block_n, block_k, use_dot, num_warps, 3)


def _dense_columns(block_t: int, use_dot: bool, bits: int) -> int:
    if use_dot:
        return 128 if bits == 16 and block_t < 64 else 64
    # 16 rows x block_k inputs x block_t tokens of float32 sums: 64 registers of each of 128 threads
    return 512 * 16 // bits // block_t if bits == 16 else 256 // block_t


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def next_tokens_block(runs: int) -> tuple[int, int]:
    """(runs that one pass of a row's program compares, its warps)."""
    block = min(1024, max(16, _power_of_2(runs)))
    return block, max(1, block // 128)
