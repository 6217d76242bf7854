"""Programmatic dependent launch: on sm_90 and later a decode kernel starts while the one before it still runs.

`follow` first lets the next kernel start likewise, then waits until the one before has ended and its writes are
visible. Whatever was written by another kernel is read after it, and every kernel launched so calls it, also one that
has nothing to wait for: the end of a kernel says nothing of those before the one before. Weights may be loaded ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def pdl_options(capability: tuple[int, int]) -> dict[str, bool]:
    """Constants and launch options of a kernel of the decode chain."""
    if capability[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
