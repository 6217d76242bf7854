"""Products of a few tokens with rows of a weight: the inner loop of every decode projection.

    acc[n, t] = sum_k w[rows_n, k] y[t, k]          y = x, or x * gain / rms(x)

Layout: x [T, K] with dense rows; a dense weight [N, K] row by row, or quantised panels of 16 rows (see
depthprune_runtime/weights/quantized.py), whose 32-bit words [tiles, 16] hold 4 or 8 codes of one row each.
A program owns BLOCK_N rows, any rows (`rows` is a vector: gate and up channels, or the two halves of a head, meet
in one tile), and all tokens, so every weight is read once. One token's products are summed in float32 lanes and 1 / rms
comes after the sum; more tokens go through the matrix units, in the dtype of x, normalised before.
K is a constant of the compiled kernel: a model has few. Loads are pipelined: `num_stages` tiles are in flight while
one is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthprune_runtime.kernels.dot import dot
from depthprune_runtime.kernels.launch_few_tokens import RowsConfig, rows_config
from depthprune_runtime.kernels.packed import CODES, ROWS
from depthprune_runtime.kernels.pdl import follow, pdl_options


@triton.jit
def inverse_rms(x_ptr, x_stride, num_tokens, K: tl.constexpr, eps, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_T] float32"""
    tokens = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        mask = (tokens < num_tokens)[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += x * x
    return tl.rsqrt(tl.sum(total, axis=1) / K + eps)


@triton.jit
def _one_input(x_ptr, gain_ptr, columns, K: tl.constexpr, NORM: tl.constexpr):
    """(x, x * gain) of a single token at `columns`, float32, zero beyond K."""
    inside = columns < K
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = x
    if NORM:
        y = x * tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return x, y


@triton.jit
def _inputs(
    x_ptr, x_stride, gain_ptr, rstd, columns, num_tokens, K: tl.constexpr, NORM: tl.constexpr, BLOCK_T: tl.constexpr
):
    """x, or its norm, at `columns`: [columns, BLOCK_T] in the dtype of x, zero beyond K and num_tokens."""
    tokens = tl.arange(0, BLOCK_T)
    inside = columns < K
    mask = inside[:, None] & (tokens < num_tokens)[None, :]
    x = tl.load(x_ptr + tokens[None, :] * x_stride + columns[:, None], mask=mask, other=0.0)
    if NORM:
        gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * rstd[None, :] * gain[:, None]).to(x.dtype)
    return x


@triton.jit
def dense_products(
    x_ptr,  # [T, K]
    x_stride,
    gain_ptr,  # [K]
    weight_ptr,  # [N, K]
    rows,  # [BLOCK_N] int
    rows_in,  # [BLOCK_N] bool
    num_tokens,
    K: tl.constexpr,
    eps,
    NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """[BLOCK_N, BLOCK_T] float32"""
    starts = weight_ptr + rows.to(tl.int64)[:, None] * K
    if USE_DOT:
        follow(PDL)
        rstd = tl.zeros([BLOCK_T], tl.float32)
        if NORM:
            rstd = inverse_rms(x_ptr, x_stride, num_tokens, K, eps, BLOCK_T, BLOCK_K)
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            columns = k + tl.arange(0, BLOCK_K)
            mask = rows_in[:, None] if EVEN_K else rows_in[:, None] & (columns < K)[None, :]
            w = tl.load(starts + columns[None, :], mask=mask, other=0.0)
            y = _inputs(x_ptr, x_stride, gain_ptr, rstd, columns, num_tokens, K, NORM, BLOCK_T)
            acc = dot(w, y, acc)
    else:
        # The first tile is on its way while the kernel before this one ends.
        columns = tl.arange(0, BLOCK_K)
        mask = rows_in[:, None] if EVEN_K else rows_in[:, None] & (columns < K)[None, :]
        w = tl.load(starts + columns[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        follow(PDL)
        x, y = _one_input(x_ptr, gain_ptr, columns, K, NORM)
        sums = w.to(tl.float32) * y[None, :]
        squares = x * x
        for k in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
            columns = k + tl.arange(0, BLOCK_K)
            mask = rows_in[:, None] if EVEN_K else rows_in[:, None] & (columns < K)[None, :]
            w = tl.load(starts + columns[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            x, y = _one_input(x_ptr, gain_ptr, columns, K, NORM)
            sums += w.to(tl.float32) * y[None, :]
            if NORM:
                squares += x * x
        acc = tl.sum(sums, axis=1)[:, None]
        if NORM:
            acc *= tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    return acc


@triton.jit
def quantized_products(
    x_ptr,  # [T, K]
    x_stride,
    gain_ptr,  # [K]
    codes_ptr,  # [P, TILES, 16] int32 words
    scales_ptr,  # [P, G, 16] bfloat16
    zeros_ptr,  # [P, G, 16] uint8, or anything where not HAS_ZEROS
    rows,  # [BLOCK_N] int
    rows_in,  # [BLOCK_N] bool
    num_tokens,
    K: tl.constexpr,
    eps,
    NORM: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    WHOLE_PANELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # words
    USE_DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """[BLOCK_N, BLOCK_T] float32"""
    PER: tl.constexpr = 32 // BITS
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    words: tl.constexpr = groups * (GROUP // PER)  # of a row
    panel = (rows // 16).to(tl.int64)
    row = rows % 16
    follow(PDL)
    rstd = tl.zeros([BLOCK_T], tl.float32)
    if NORM:
        rstd = inverse_rms(x_ptr, x_stride, num_tokens, K, eps, BLOCK_T, 256)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in tl.range(0, words, BLOCK_K, num_stages=STAGES):
        word = first + tl.arange(0, BLOCK_K)
        mask = rows_in[:, None] & (word < words)[None, :]
        start = panel * words * 16 + row
        if WHOLE_PANELS:  # or a tile of two panels loads word by word
            start = tl.max_contiguous(tl.multiple_of(start, 16), 16)
        codes = tl.load(codes_ptr + start[:, None] + word[None, :] * 16, mask=mask, other=0)
        group = (word * PER) // GROUP
        place = (panel * groups * 16 + row)[:, None] + group[None, :] * 16
        scale = tl.load(scales_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            zero = tl.load(zeros_ptr + place, mask=mask, other=0).to(tl.float32)
        else:
            zero = tl.full([BLOCK_N, BLOCK_K], 1 << (BITS - 1), tl.float32)
        for i in tl.static_range(PER):
            # 4 bits: the low halves of the four bytes are the first four columns, the high halves the others
            shift = 8 * i if BITS == 8 or i < 4 else 8 * (i - 4) + 4
            code = (codes >> shift) & ((1 << BITS) - 1)
            w = (code.to(tl.float32) - zero) * scale
            if USE_DOT:
                y = _inputs(x_ptr, x_stride, gain_ptr, rstd, word * PER + i, num_tokens, K, NORM, BLOCK_T)
                acc = dot(w.to(y.dtype), y, acc)
            else:
                _, y = _one_input(x_ptr, gain_ptr, word * PER + i, K, NORM)
                sums += w * y[None, :]
    if not USE_DOT:
        acc = tl.sum(sums, axis=1)[:, None]
        if NORM:
            acc *= rstd[None, :]
    return acc


@triton.jit
def products(
    x_ptr,
    x_stride,
    gain_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    rows,
    rows_in,
    num_tokens,
    K: tl.constexpr,
    eps,
    NORM: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    WHOLE_PANELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """[BLOCK_N, BLOCK_T] float32"""
    if not QUANTIZED:
        acc = dense_products(
            x_ptr, x_stride, gain_ptr, weight_ptr, rows, rows_in, num_tokens, K, eps,
            NORM, BLOCK_T, BLOCK_N, BLOCK_K, EVEN_K, USE_DOT, STAGES, PDL,
        )  # fmt: skip
    else:
        acc = quantized_products(
            x_ptr, x_stride, gain_ptr, weight_ptr, scales_ptr, zeros_ptr, rows, rows_in, num_tokens, K, eps,
            NORM, BITS, GROUP, HAS_ZEROS, WHOLE_PANELS, BLOCK_T, BLOCK_N, BLOCK_K, USE_DOT, STAGES, PDL,
        )  # fmt: skip
    return acc


@triton.jit
def halves(acc, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N, BLOCK_T] -> its first and its last BLOCK_N / 2 rows."""
    return tl.split(tl.permute(tl.reshape(acc, [2, BLOCK_N // 2, BLOCK_T]), [1, 2, 0]))


def weight_arguments(tensors: list[Tensor], layout: list[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weight or words, scales, zeros) as the kernels take them."""
    if layout[1] == ROWS:
        return tensors[0], None, None
    return tensors[0].view(torch.int32), tensors[1], tensors[2] if len(tensors) == 3 else None


def configure(
    x: Tensor, tensors: list[Tensor], layout: list[int], capability: tuple[int, int], apart: int = 0
) -> tuple[RowsConfig, dict[str, object]]:
    """The configuration and the constants of `products` for `x` and a packed weight.

    apart: rows between the halves of a tile; 0: it takes neighbours.
    """
    out_features, number, bits, group_size = layout
    bits_of_weight = 8 * x.element_size() if number == ROWS else bits
    config = rows_config(x.shape[0], out_features, x.shape[1], bits_of_weight, capability, paired=apart > 0)
    constants: dict[str, object] = {
        "QUANTIZED": number == CODES,
        "BITS": bits,
        "GROUP": group_size,
        "HAS_ZEROS": len(tensors) == 3,
        "WHOLE_PANELS": number == CODES and apart % 16 == 0,
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EVEN_K": x.shape[1] % config.block_k == 0,
        "USE_DOT": config.use_dot,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        **pdl_options(capability),
    }
    return config, constants
