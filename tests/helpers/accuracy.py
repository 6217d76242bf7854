"""The one tolerance rule: an implementation may err at most twice as much as plain torch in the same dtype.

    err(implementation, truth) <= 2 * err(torch in the same dtype, truth) + atol(dtype) * max|truth|

for the largest and for the mean absolute error: the first finds a wrong element, the second a wrong rounding
everywhere that hides below one outlier. Truth is computed in float64 (or float32 where float64 is out of reach).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the largest true magnitude. About a thirtieth of a rounding step in half precision: enough for a
# value that two correct orders of summation round to different neighbours, far less than one wrong rounding.
ATOL = {torch.float32: 1e-6, torch.float16: 3e-5, torch.bfloat16: 2.5e-4}


def assert_as_accurate(
    actual: Tensor,  # [...]
    baseline: Tensor,  # [...], plain torch in the same dtype
    truth: Tensor,  # [...], float64 or float32
    what: str = "output",
) -> None:
    """Fail unless `actual` keeps the rule above, has the dtype and shape of `baseline` and no NaN of its own."""
    assert actual.dtype == baseline.dtype, f"{what}: expected dtype {baseline.dtype}, got {actual.dtype}"
    assert actual.shape == truth.shape, f"{what}: expected shape {list(truth.shape)}, got {list(actual.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    truth = truth.double()
    slack = ATOL[actual.dtype] * float(truth.abs().max())
    errors = (actual.double() - truth).abs()
    limits = (baseline.double() - truth).abs()
    for name, error, limit in (("largest", errors.max(), limits.max()), ("mean", errors.mean(), limits.mean())):
        assert error <= 2 * limit + slack, (
            f"{what}: {name} error {error:.3e} against {limit:.3e} of plain torch in {actual.dtype} (slack {slack:.1e})"
        )
