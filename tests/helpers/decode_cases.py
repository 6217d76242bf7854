"""Cases of the fused decode ops, dense and quantised, at shapes that models have; see op_cases.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from op_case import Arguments, Case, Draw, named_cases
from torch import Tensor

from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.spec import RopeSpec
from depthprune_runtime.weights.packed import pack
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

CPU = torch.device("cpu")


def _weight(draw: Draw, outputs: int, inputs: int, bits: int) -> tuple[list[Tensor], list[int]]:
    """A packed weight: dense, or quantised in groups of 64 with zero points where it has 4 bits."""
    if not bits:
        return pack(draw(outputs, inputs, scale=inputs**-0.5))
    spec = QuantSpec(bits, 64, symmetric=bits == 8)
    groups = -(-inputs // 64)
    codes = torch.randint(0, spec.levels, (outputs, inputs), generator=draw.generator)
    scales = (torch.rand(outputs, groups, generator=draw.generator) * 2 / spec.levels * inputs**-0.5).bfloat16()
    zeros = torch.randint(0, spec.levels, (outputs, groups), generator=draw.generator) if bits == 4 else None
    return pack(QuantizedWeight.from_codes(spec, codes, scales, zeros))


def _norm_linear(
    tokens: int, inputs: int, outputs: int, bits: int = 0, bias: bool | None = False
) -> Callable[[Draw], Arguments]:
    """bias: None for an op that takes none."""

    def build(draw: Draw) -> Arguments:
        x, gain = draw(tokens, inputs, outlier=True), 1 + 0.2 * draw(inputs)
        weight = _weight(draw, outputs, inputs, bits)
        return x, gain, 1e-5, *weight, *(() if bias is None else (draw(outputs) if bias else None,))

    return build


def _linear_add(tokens: int, inputs: int, outputs: int, bits: int = 0) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        x = draw(tokens, inputs, scale=0.1, outlier=True)
        return x, draw(tokens, outputs), *_weight(draw, outputs, inputs, bits), draw(outputs) if bits else None

    return build


def _norm_qkv(
    tokens: int, hidden: int, heads: int, kv_heads: int, dim: int, bits: int = 0
) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        outputs = (heads + 2 * kv_heads) * dim
        start = _norm_linear(tokens, hidden, outputs, bits, bias=True)(draw)
        caches = [draw(tokens // 16 + 3, 16, kv_heads, dim) for _ in range(2)]
        positions, slots = draw.permutation(4096)[:tokens], draw.permutation(caches[0].shape[0] * 16)[:tokens]
        slots[3::4] = -1
        return *start, RotaryTable(RopeSpec(), dim, CPU).rows(4096), positions, slots, *caches

    return build


def _next_tokens(batch: int, runs: int) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        def below(most: int, *shape: int) -> Tensor:
            return torch.randint(0, most, shape, generator=draw.generator)

        best = below(100, batch, runs).float()
        best[0, runs // 2] = torch.inf
        candidates, stops, tables = below(99, batch, runs).int(), below(99, batch, 4), below(50, batch, 8)
        positions = below(100, batch)
        slots = torch.where(torch.arange(batch) % 5 == 3, -1, positions)
        drawn = torch.where(torch.arange(batch) % 2 == 0, -1, below(99, batch))
        return (
            best, candidates, drawn, stops, tables, 16, below(99, batch), positions, slots, positions + 1,
            below(6, batch), torch.full((5, batch), -7),
        )  # fmt: skip

    return build


def _draw_tokens(batch: int, size: int) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        temperatures = torch.arange(batch) % 3 * 0.7
        uniform = torch.rand(5, batch, dtype=torch.float64, generator=draw.generator)
        counts = torch.randint(0, 6, (batch,), generator=draw.generator)
        return 3 * draw(batch, size), temperatures, uniform, counts

    return build


DECODE_CASES: dict[str, list[Case]] = {
    "norm_linear": named_cases(
        "norm_linear", _norm_linear, (1, 576, 960), (3, 577, 40, 0, True), (64, 256, 96), (1, 4096, 512, 8),
        (5, 576, 96, 4, True), big=[(1, 4096, 12288), (8, 4096, 12288), (1, 4096, 6144, 4), (64, 4096, 6144)],
    ),
    "norm_gated_linear": named_cases(
        "norm_gated_linear", _norm_linear, (1, 576, 3072), (3, 577, 40, 0, True), (64, 256, 96), (1, 576, 3072, 8),
        (5, 576, 96, 4, True), big=[(1, 4096, 22016), (8, 4096, 28672), (1, 4096, 22016, 4), (64, 4096, 44032)],
    ),
    "norm_logits": named_cases(
        "norm_logits", lambda *shape: _norm_linear(*shape, bias=None), (1, 576, 1000), (5, 577, 131), (1, 576, 1000, 8),
        big=[(1, 4096, 32000), (8, 4096, 128256), (1, 4096, 32000, 4)],
    ),
    "linear_add": named_cases(
        "linear_add", _linear_add, (1, 576, 576), (1, 1536, 576), (3, 577, 40), (64, 256, 96), (1, 1536, 576, 8),
        (5, 576, 96, 4), big=[(1, 11008, 4096), (8, 4096, 4096), (1, 14336, 4096, 4), (64, 22016, 4096)],
    ),
    "norm_qkv": named_cases(
        "norm_qkv", _norm_qkv, (1, 576, 9, 3, 64), (5, 96, 3, 1, 24), (1, 576, 9, 3, 64, 8), (6, 576, 18, 6, 64, 4),
        big=[(1, 4096, 32, 32, 128), (8, 4096, 32, 8, 128), (64, 4096, 64, 64, 128), (1, 4096, 32, 8, 128, 4)],
    ),
    "draw_tokens": named_cases("draw_tokens", _draw_tokens, (1, 40), (7, 3000), big=[(64, 128256)]),
    "next_tokens": named_cases("next_tokens", _next_tokens, (1, 7), (9, 100), big=[(64, 8016)]),
}  # fmt: skip
