"""Dense linear algebra on matrices that may not fit into memory: wide Gram matrices and their factors.

A Gram matrix of a merged FFN of 2 * 8192 channels takes 1.07 GB in float32, its float64 factor 2.15 GB. Above
`scratch_limit()` bytes everything here lives in unlinked mapped files (`states.scratch_tensor`), on a GPU in its
memory; the functions work in place or in strips of rows, so that no second copy of a matrix is ever made.

    system = gather_symmetric(gram, columns)          # G[columns][:, columns], float64
    lam = add_ridge_(system, 0.1)                     # + 0.1 mean(diag) I
    factor = cholesky_(system)                        # L, over `system`
    solution = cholesky_solve_(factor, right)         # (L L')^-1 right, over `right`

LAPACK works in place on column-major matrices only: `cholesky_` and `cholesky_solve_` refuse others, which
torch would copy silently. `empty_column_major` and `gather_symmetric` make them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting import states

_STRIP_BYTES = 32 * 1024 * 1024  # of a temporary strip of rows
_BLOCK = 512  # columns of the inverse at a time
_PANELS = 6  # of a Gram matrix: 7/12 of the multiplications of a full one
_LEAST_PANEL = 128  # columns; smaller ones only cost calls
_TINY = 1e-30  # keeps an all-zero system solvable


def scratch_limit() -> int:
    """Bytes above which a matrix goes to a file. Several are alive at once, so less than one buffer may take."""
    return states.MEMORY_LIMIT // 8


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised row-major tensor, in memory or, if large, in a scratch file."""
    return states.scratch_tensor(shape, dtype, device, scratch_limit())


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row-major tensor of zeros, in memory or, if large, in a scratch file (new pages of a file are zero)."""
    made = empty(shape, dtype, device)
    nbytes = math.prod(shape) * dtype.itemsize
    return made if device.type == "cpu" and nbytes > scratch_limit() else made.zero_()


def empty_column_major(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [rows, columns] of strides (1, rows), in memory or, if large, in a scratch file."""
    return empty((columns, rows), dtype, device).T


def _strips(rows: int, row_bytes: int) -> list[slice]:
    step = max(1, _STRIP_BYTES // max(1, row_bytes))
    return [slice(first, min(rows, first + step)) for first in range(0, rows, step)]


def accumulate_(
    total: Tensor,  # [A, B]
    left: Tensor,  # [T, A]
    right: Tensor,  # [T, B]
    weights: Tensor | None = None,  # [T, 1]
) -> Tensor:
    """total += left' diag(weights) right, in place, in total's dtype; tokens are converted strip by strip."""
    widest = total.element_size() * max(left.shape[1], right.shape[1])
    for rows in _strips(left.shape[0], widest):
        weighted = left[rows].to(total.dtype)
        if weights is not None:
            weighted = weighted * weights[rows].to(total.dtype)
        total.addmm_(weighted.T, right[rows].to(total.dtype))
    return total


def _panels(size: int) -> list[slice]:
    step = max(_LEAST_PANEL, -(-size // _PANELS))
    return [slice(first, min(size, first + step)) for first in range(0, size, step)]


def accumulate_gram_(
    total: Tensor,  # [W, W]
    values: Tensor,  # [T, W]
    weights: Tensor | None = None,  # [T, 1]
) -> Tensor:
    """total += values' diag(weights) values, in place, on and above the diagonal only, panel by panel: 7/12 of
    the multiplications of `accumulate_`. `mirror_` fills the rest in when all tokens are in."""
    for rows in _strips(values.shape[0], total.element_size() * values.shape[1]):
        strip = values[rows].to(total.dtype)
        weighted = strip if weights is None else strip * weights[rows].to(total.dtype)
        for panel in _panels(total.shape[0]):
            total[panel, panel.start :].addmm_(weighted[:, panel].T, strip[:, panel.start :])
    return total


def mirror_(total: Tensor) -> Tensor:  # [W, W]
    """Copy what lies above the diagonal below it."""
    panels = _panels(total.shape[0])
    for i, panel in enumerate(panels):
        for later in panels[i + 1 :]:
            total[later, panel] = total[panel, later].T
    return total


def gather_symmetric(
    gram: Tensor,  # [W, W] symmetric
    columns: Tensor | None = None,  # [k] int64
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # [k, k] column-major
    """A new matrix gram[columns][:, columns] (None: all of it) in `dtype`, for `cholesky_`."""
    count = gram.shape[0] if columns is None else columns.shape[0]
    made = empty_column_major(count, count, dtype, gram.device)
    for rows in _strips(count, gram.shape[1] * dtype.itemsize):
        strip = gram[rows] if columns is None else gram[columns[rows]].index_select(1, columns)
        made.T[rows] = strip  # a symmetric matrix is its own transpose
    return made


def multiply(
    matrix: Tensor,  # [M, N], any dtype
    right: Tensor,  # [N, C]
    rows: Tensor | None = None,  # [k] int64
) -> Tensor:  # [k or M, C] column-major
    """matrix[rows] @ right (None: all rows) in right's dtype, `matrix` converted strip by strip."""
    count = matrix.shape[0] if rows is None else rows.shape[0]
    made = empty_column_major(count, right.shape[1], right.dtype, right.device)
    for part in _strips(count, matrix.shape[1] * right.element_size()):
        strip = matrix[part] if rows is None else matrix[rows[part]]
        made[part] = strip.to(right.dtype) @ right
    return made


def inner_product(left: Tensor, right: Tensor) -> float:  # [M, N] twice
    """sum_ij left_ij right_ij in float64, strip by strip of columns (column-major matrices are read in order)."""
    total = 0.0
    for part in _strips(left.shape[1], 8 * left.shape[0]):
        total += float((left[:, part].double() * right[:, part].double()).sum())
    return total


def ridge(gram: Tensor, lam: float) -> float:  # [N, N]
    """lam times the mean of the diagonal, which of a Gram matrix is the mean singular value."""
    return lam * float(gram.diagonal().double().mean()) + _TINY


def add_ridge_(system: Tensor, lam: float) -> float:  # [N, N]
    """system += lam mean(diag system) I, in place; returns what was added to the diagonal."""
    absolute = ridge(system, lam)
    system.diagonal().add_(absolute)
    return absolute


def _require_column_major(name: str, matrix: Tensor) -> None:
    assert matrix.mT.is_contiguous(), f"{name}: expected a column-major matrix, got strides {matrix.stride()}"


def cholesky_(system: Tensor) -> Tensor:  # [N, N] column-major -> lower factor [N, N], the same memory
    """Overwrite a positive definite `system` with its lower Cholesky factor L, system = L L'.

    Raises InputError if it is not positive definite; `system` is then lost.
    """
    _require_column_major("system", system)
    try:
        factor: Tensor = torch.linalg.cholesky(system, out=system)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError(
            "the equations of a sub-layer cannot be solved: too few tokens for its width, or too small a ridge; give "
            "more calibration tokens, or a larger ridge"
        ) from error
    return factor


def cholesky_solve_(factor: Tensor, right: Tensor) -> Tensor:  # [N, N], [N, C], both column-major
    """Overwrite `right` with (L L')^-1 right, L the lower `factor`."""
    _require_column_major("factor", factor)
    _require_column_major("right", right)
    torch.linalg.solve_triangular(factor, right, upper=False, out=right)
    torch.linalg.solve_triangular(factor.mT, right, upper=True, out=right)
    return right


def inverse_diagonal(factor: Tensor) -> Tensor:  # lower factor [N, N] -> [N]
    """Diagonal of (L L')^-1: the squared column norms of L^-1, found _BLOCK columns at a time."""
    size = factor.shape[0]
    found = torch.empty(size, dtype=factor.dtype, device=factor.device)
    for first in range(0, size, _BLOCK):
        width = min(_BLOCK, size - first)
        part = factor.new_zeros(size - first, width)  # rows `first` and below of L^-1; those above are zero
        part[:width].fill_diagonal_(1.0)
        for top in range(first, size, _BLOCK):
            rows = slice(top, min(size, top + _BLOCK))
            here = slice(top - first, rows.stop - first)
            right = part[here]
            if top > first:
                right = right - factor[rows, first:top] @ part[: top - first]
            part[here] = torch.linalg.solve_triangular(factor[rows, rows], right, upper=False)
        found[first : first + width] = part.pow(2).sum(0)
    return found


def inverse_(factor: Tensor) -> Tensor:  # lower factor [N, N] column-major -> [N, N], the same memory
    """Overwrite a lower Cholesky `factor` with the whole symmetric inverse (L L')^-1."""
    _require_column_major("factor", factor)
    inverse: Tensor = torch.cholesky_inverse(factor, out=factor)
    return inverse
