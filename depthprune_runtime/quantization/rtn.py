"""Round to nearest, on the grid of each group that errs least.

    w ~ scale (u - zero)        u = clamp(round(w / scale) + zero, 0, L - 1),  L = 2^bits

A grid is a scale and a zero point. The narrowest that clips no weight of the group is

    symmetric    scale = max(n / (L / 2), p / (L / 2 - 1)), where n is the largest magnitude, p the largest of the
                 other sign; negative where n is that of a positive weight, since codes reach further down than up
    asymmetric   scale = (max(w, 0) - min(w, 0)) / (L - 1), zero = round(-min(w, 0) / scale)

At 4 bits another one may err less, most often a narrower one, which clips the largest weights: of `_RATIOS` times that
scale, each rounded to bfloat16 before codes are chosen, the one of the least squared error is taken, each column
weighted by its importance. The same idea is in llama.cpp's `make_qx_quants` and in AWQ (arXiv 2306.00978, clipping).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

_RATIOS = {8: (1.0,), 4: (1.0, *(1.1 - 0.025 * i for i in range(17)))}  # the first brings back what is on a grid
_STRIP_ELEMENTS = 1 << 21  # of a weight at a time, for its temporaries


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every group; float32, the scales exact in bfloat16."""

    spec: QuantSpec
    scales: Tensor  # [N, groups]
    zeros: Tensor  # [N, groups]

    def columns(self, index: Tensor) -> Grid:  # [k] int64
        """The grid that each of the weight's columns `index` lies on: scales and zeros [N, k]."""
        group = index // self.spec.group_size
        return Grid(self.spec, self.scales[:, group], self.zeros[:, group])

    def encode(self, weight: Tensor) -> Tensor:  # [N, k] -> [N, k] float32
        """Codes of a weight on the grid of its columns."""
        return _encode(weight, self.scales, self.zeros, self.spec)

    def decode(self, codes: Tensor) -> Tensor:  # [N, k] -> [N, k]
        return (codes - self.zeros) * self.scales

    def weight(self, codes: Tensor) -> QuantizedWeight:  # [N, K]
        """The quantised weight of `codes`, by this grid of groups."""
        return QuantizedWeight.from_codes(
            self.spec, codes.to(torch.uint8), self.scales, None if self.spec.symmetric else self.zeros
        )


def _encode(weight: Tensor, scales: Tensor, zeros: Tensor, spec: QuantSpec) -> Tensor:
    steps = torch.where(scales == 0, 0.0, weight / scales)  # a group of zeros has scale 0
    return (steps.round() + zeros).clamp_(0, spec.levels - 1)


def _grouped(weight: Tensor, group_size: int) -> Tensor:  # [N, K] -> [N, groups, G] float32, filled up with zeros
    missing = -weight.shape[1] % group_size
    filled = torch.nn.functional.pad(weight.float(), (0, missing))
    return filled.view(weight.shape[0], -1, group_size)


def _bf16_up(scales: Tensor) -> Tensor:
    """Rounded to bfloat16 away from zero, so that a grid which clips nothing does not begin to."""
    rounded = scales.to(torch.bfloat16)
    bits = rounded.view(torch.int16)
    return torch.where(rounded.float().abs() < scales.abs(), bits + 1, bits).view(torch.bfloat16).float()


def _unclipped(groups: Tensor, spec: QuantSpec) -> Tensor:  # [N, groups, G] -> [N, groups]
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if not spec.symmetric:
        return (high - low) / (spec.levels - 1)
    half = spec.levels / 2
    far, near = torch.maximum(high, -low), torch.minimum(high, -low)
    scale = torch.maximum(far / half, near / (half - 1))
    return torch.where(high > -low, -scale, scale)


def _zeros(groups: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    if spec.symmetric:
        return torch.full_like(scales, spec.levels / 2)
    low = groups.amin(-1).clamp(max=0)
    return torch.where(scales == 0, 0.0, -low / scales).round().clamp_(0, spec.levels - 1)


def _best_grid(groups: Tensor, spec: QuantSpec, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    unclipped = _unclipped(groups, spec)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for ratio in _RATIOS[spec.bits]:
        scales = _bf16_up(unclipped * ratio)
        zeros = _zeros(groups, scales, spec)
        s, z = scales[..., None], zeros[..., None]
        errors = ((_encode(groups, s, z, spec) - z) * s - groups).square_()
        error = (errors if importance is None else errors * importance).sum(-1)
        if best is None:
            best = error, scales, zeros
        else:
            less = error < best[0]
            best = (
                torch.where(less, error, best[0]),
                torch.where(less, scales, best[1]),
                torch.where(less, zeros, best[2]),
            )
    assert best is not None
    return best[1], best[2]


def choose_grid(
    weight: Tensor,  # [N, K]
    spec: QuantSpec,
    importance: Tensor | None = None,  # [K]: of the error of each column; all alike by default
) -> Grid:
    """Scale and zero point of every group of `weight`."""
    weights = None if importance is None else _grouped(importance[None], spec.group_size)
    parts = [
        _best_grid(_grouped(strip, spec.group_size), spec, weights)
        for strip in weight.split(max(1, _STRIP_ELEMENTS // weight.shape[1]))
    ]
    return Grid(spec, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def rtn(
    weight: Tensor,  # [N, K]
    spec: QuantSpec,
    importance: Tensor | None = None,  # [K]
) -> QuantizedWeight:
    """`weight` rounded to nearest on the grid of `choose_grid`."""
    grid = choose_grid(weight, spec, importance)
    every = torch.arange(weight.shape[1], device=weight.device)
    rows = max(1, _STRIP_ELEMENTS // weight.shape[1])
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        strip = Grid(spec, grid.scales[part], grid.zeros[part])
        codes[part] = strip.columns(every).encode(weight[part].float()).to(torch.uint8)
    return grid.weight(codes)
