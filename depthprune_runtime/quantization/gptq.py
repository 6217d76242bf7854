"""GPTQ (arXiv 2210.17323): round a column, and let those not yet rounded make up for its error.

With G = mean of x x' over the calibration inputs, rounding W to Q costs tr((W - Q) G (W - Q)'). Columns are rounded one
after the other; whenever column i has been rounded, the columns J not yet rounded move to what then costs least:

    W_J += (q_i - w_i) / U_ii * U_iJ        U' U = (G + 0.01 mean(diag G) I)^-1, U upper triangular

The columns of the largest mean square go first (the authors' act-order), while there are still many to make up for
their errors. Groups nevertheless stay those of neighbouring columns: their grids are chosen beforehand (static
groups), each by the squared error weighted with diag G. Updates beyond a block of 128 columns are made together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.fitting import linalg
from depthprune_runtime.quantization.rtn import Grid, choose_grid
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

DAMPING = 0.01  # of the mean of G's diagonal
_BLOCK = 128  # columns
_STRIP_ELEMENTS = 1 << 25  # of the weight at a time: rows do not depend on each other


def _order(gram: Tensor) -> Tensor:  # [K, K] -> [K] int64
    return gram.diagonal().argsort(descending=True, stable=True)


def _inverse_factor(gram: Tensor, order: Tensor, damping: float) -> Tensor:  # [K, K] -> [K, K] float32
    """U of the formula, for the columns in `order`, by way of one matrix in float64."""
    system = linalg.gather_symmetric(gram, order)
    linalg.add_ridge_(system, damping)
    inverse = linalg.inverse_(linalg.cholesky_(system))
    return linalg.empty(tuple(gram.shape), torch.float32, gram.device).copy_(linalg.cholesky_(inverse).T)


def _round_columns(weight: Tensor, factor: Tensor, grid: Grid) -> Tensor:  # [N, K] float32 -> [N, K] uint8
    """Codes of `weight`, whose columns, like those of `factor` and `grid`, stand in the order of rounding."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, weight.shape[1], _BLOCK):
        here = slice(first, min(first + _BLOCK, weight.shape[1]))
        block = weight[:, here].T.contiguous()  # [k, N]: a column of the weight is a row here
        local = factor[here, here]
        errors = torch.empty_like(block)
        for i in range(block.shape[0]):
            column = Grid(grid.spec, grid.scales[:, first + i], grid.zeros[:, first + i])
            code = column.encode(block[i])
            errors[i] = (block[i] - column.decode(code)) / local[i, i]
            codes[:, first + i] = code.to(torch.uint8)
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        weight[:, here.stop :].addmm_(errors.T, factor[here, here.stop :], alpha=-1)
    return codes


def gptq(
    weight: Tensor,  # [N, K]
    gram: Tensor,  # [K, K] symmetric: second moments of the projection's inputs
    spec: QuantSpec,
    damping: float = DAMPING,
) -> QuantizedWeight:
    """`weight` quantised so that the projection's outputs change little on inputs like those of `gram`."""
    order = _order(gram)
    factor = _inverse_factor(gram, order, damping)
    grid = choose_grid(weight, spec, gram.diagonal())
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, _STRIP_ELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        strip = Grid(spec, grid.scales[part], grid.zeros[part]).columns(order)
        codes[part, order] = _round_columns(weight[part].float()[:, order], factor, strip)
    return grid.weight(codes)
