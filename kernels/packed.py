"""Checks of what the launchers of decode projections are given: a packed weight and the gain of a norm.

    layout [N, format, bits, group_size]
    ROWS     [weight [N, K]], in the dtype of x
    CODES    [codes [P, K' bits / 32, 16, 4], scales [P, K' / group_size, 16]]; asymmetric: and zeros like scales

P = ceil(N / 16); K' is K rounded up to whole groups. Codes and zeros are uint8, scales bfloat16. Panels are for kernels
of the CPU only. Formats have the numbers of depthprune_runtime/weights/weight.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, PANELS, CODES = 0, 1, 2
GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PANEL_ROWS = 16


def packed_parts(op: str, x: Tensor, layout: list[int], count: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of the `count` tensors of a weight [N, K] for `x` [T, K]."""
    if len(layout) != 4 or layout[0] < 1:
        raise ValueError(f"{op}: expected layout [N, format, bits, group_size] with N >= 1, got {layout}")
    rows, number, bits, group_size = layout
    if number == ROWS:
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight": ((rows, x.shape[1]), x.dtype)}
    elif number == PANELS:
        raise ValueError(f"{op}: expected a weight in rows or quantised, got panels, which only CPU kernels read")
    elif number != CODES:
        raise ValueError(f"{op}: expected format {ROWS} (rows) or {CODES} (codes), got {number}")
    elif bits not in (8, 4) or group_size not in GROUP_SIZES:
        raise ValueError(f"{op}: expected 8 or 4 bits in groups of 32, 64 or 128, got {bits} and {group_size}")
    else:
        panels = -(-rows // _PANEL_ROWS)
        groups = -(-x.shape[1] // group_size)
        parts = {
            "codes": ((panels, groups * group_size * bits // 32, _PANEL_ROWS, 4), torch.uint8),
            "scales": ((panels, groups, _PANEL_ROWS), torch.bfloat16),
        }
        if count == 3:
            parts["zeros"] = ((panels, groups, _PANEL_ROWS), torch.uint8)
    if len(parts) != count:
        raise ValueError(f"{op}: expected the tensors {', '.join(parts)}, got {count} tensors")
    return parts


def check_packed(op: str, x: Tensor, tensors: list[Tensor], layout: list[int], bias: Tensor | None) -> None:
    """ValueError unless `x` [T, K] meets the packed weight [N, K] and `bias` [N]."""
    if x.dim() != 2 or x.shape[1] < 1 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"{op}: expected x of shape [T, K] with dense rows, K >= 1, got {list(x.shape)}, {x.stride()}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: expected x of dtype bfloat16, float16 or float32, got {x.dtype}")
    parts = packed_parts(op, x, layout, len(tensors))
    for (name, (shape, dtype)), tensor in zip(parts.items(), tensors, strict=True):
        if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != x.device:
            raise ValueError(
                f"{op}: expected {name} of shape {list(shape)}, contiguous, on {x.device}, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"{op}: expected {name} of dtype {dtype}, got {tensor.dtype}")
    if bias is None:
        return
    if tuple(bias.shape) != (layout[0],) or bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(
            f"{op}: expected bias of shape [{layout[0]}] in {x.dtype} on {x.device}, "
            f"got {list(bias.shape)} in {bias.dtype} on {bias.device}"
        )
    if bias.stride(0) != 1 and layout[0] > 1:
        raise ValueError(f"{op}: expected a contiguous bias, got stride {bias.stride(0)}")


def check_norm(op: str, x: Tensor, norm: Tensor) -> None:
    """ValueError unless `norm` [K] is a gain for `x` [T, K]."""
    if tuple(norm.shape) != (x.shape[1],) or norm.device != x.device or norm.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{op}: expected norm of shape [{x.shape[1]}] in {x.dtype} or float32 on {x.device}, "
            f"got {list(norm.shape)} in {norm.dtype} on {norm.device}"
        )
    if not norm.is_contiguous():
        raise ValueError(f"{op}: expected a contiguous norm, got stride {norm.stride(0)}")


def few(x: Tensor, most: int) -> bool:
    """Whether x [T, K] has 1 to `most` tokens, for which a kernel that reads the weight once is made."""
    return x.dim() == 2 and 1 <= x.shape[0] <= most
