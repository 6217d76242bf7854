"""Which units a wide sub-layer keeps if its output projection is solved anew: backward elimination.

With H = G + lam I and B = Z'R + lam W0' (see `repair`), the repaired projection is X = H^-1 B, and the loss that
taking unit u out adds, everything else solved anew, is

    cost_u = tr(X_u' [(H^-1)_uu]^-1 X_u)

(Hassibi and Stork, Optimal Brain Surgeon, NeurIPS 1992, with several outputs and units of several columns). The
cheapest units go, H^-1 and X are updated to what is left, and so on. KV groups go one by one; channels in
_STEPS parts, exact within a part but for what its members mean to one another.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from depthprune_runtime.fitting import linalg
from depthprune_runtime.fitting.projection import Moments
from depthprune_runtime.spec import AttentionSpec, SublayerSpec

_STEPS = 24  # parts in which channels go


def _costs(inverse: Tensor, solution: Tensor, units: Tensor, width: int) -> Tensor:
    """Loss that each of `units` adds by going: [N, N], [N, C], [u] -> [u]."""
    if width == 1:
        energies = torch.linalg.vector_norm(solution, dim=1).square()  # without a copy of the solution
        costs: Tensor = energies[units] / inverse.diagonal()[units]
        return costs
    found = []
    for unit in units.tolist():
        rows = slice(unit * width, (unit + 1) * width)
        factor = torch.linalg.cholesky(inverse[rows, rows])
        found.append(torch.linalg.solve_triangular(factor, solution[rows], upper=False).pow(2).sum())
    return torch.stack(found)


def _eliminate_(inverse: Tensor, solution: Tensor, columns: Tensor) -> None:  # [N, N], [N, C], [k]
    """Take `columns` out of the system, in place; their rows are left without meaning."""
    panel = inverse[:, columns]
    scaled = torch.cholesky_solve(panel.T, torch.linalg.cholesky(panel[columns]))  # [k, N]
    solution.addmm_(scaled.T, solution[columns], alpha=-1.0)
    inverse.addmm_(panel, scaled, alpha=-1.0)


def choose_after_repair(
    moments: Moments,
    initial: Tensor,  # [C, W] the wide output projection
    spec: SublayerSpec,
    count: int,
    lam: float,
) -> tuple[int, ...]:
    """The `count` units (KV groups or channels) with which the repaired sub-layer meets its target best, rising.

    lam: the repair's ridge, relative to the mean of the Gram diagonal.
    """
    total = spec.num_kv_heads if isinstance(spec, AttentionSpec) else initial.shape[1]
    width = initial.shape[1] // total
    system = linalg.gather_symmetric(moments.gram)
    absolute = linalg.add_ridge_(system, lam)
    solution = linalg.empty_column_major(system.shape[0], initial.shape[0], system.dtype, system.device)
    solution.copy_(moments.cross).add_(initial.T, alpha=absolute)
    linalg.cholesky_(system)
    linalg.cholesky_solve_(system, solution)
    inverse = linalg.inverse_(system)
    left = torch.arange(total, device=system.device)
    steps = total - count if width > 1 else min(_STEPS, total - count)
    for step in range(steps):
        going = math.ceil((len(left) - count) / (steps - step))
        order = _costs(inverse, solution, left, width).argsort(stable=True)
        gone, left = left[order[:going]], left[order[going:]].sort().values
        columns = (gone[:, None] * width + torch.arange(width, device=gone.device)).flatten()
        _eliminate_(inverse, solution, columns)
    return tuple(left.tolist())
