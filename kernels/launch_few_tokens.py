"""Launch configurations of the decode projections (`rows`): pure functions of shape and compute capability."""

from __future__ import annotations

import functools
from dataclasses import dataclass

MAX_TOKENS = 64  # above it a GEMM library is the better choice
RUN = 16  # rows of the head whose largest logit is found where they are computed
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
def rows_config(
    num_tokens: int, rows: int, columns: int, bits: int, capability: tuple[int, int], paired: bool = False
) -> RowsConfig:
    """For `num_tokens` tokens and a weight [rows, columns] of `bits` bits (32, 16; 8 and 4: quantised).

    paired: a tile takes its rows from two places.
    """
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"rows: expected 1 to {MAX_TOKENS} tokens, got {num_tokens}")
    sms = _SMS.get(capability[0], 132)
    use_dot = num_tokens > 1
    block_t = max(16, _power_of_2(num_tokens)) if use_dot else 1
    # Two programs on every multiprocessor at least, or the last ones run alone. Quantised panels have 16 rows, which
    # are contiguous word by word: a place of a pair takes a whole panel.
    wide = paired or (use_dot and bits == 4) if bits <= 8 else use_dot and rows >= 64 * sms
    block_n = 32 if wide else 16
    if bits > 8:
        # One token: 512 inputs of 16 rows are 64 float32 sums of each of 128 threads.
        block_k = (512 if bits == 16 else 256) if not use_dot else (128 if bits == 16 and block_t < 64 else 64)
    else:
        columns = -(-columns * bits // 32)  # words of 32 / bits codes
        # 8 products a word: 32 words at a time do not fit the registers of sm_90's dot
        block_k = 64 if not use_dot and not wide else 16 if use_dot and bits == 4 else 32
    block_k = min(block_k, max(16, _power_of_2(columns)))
    num_warps = 4 if use_dot else min(4, max(1, block_n * block_k // 256))
    return RowsConfig(block_t, block_n, block_k, use_dot, num_warps, 3)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def next_tokens_block(runs: int) -> tuple[int, int]:
    """(runs that one pass of a row's program compares, its warps)."""
    block = min(1024, max(16, _power_of_2(runs)))
    return block, max(1, block // 128)
