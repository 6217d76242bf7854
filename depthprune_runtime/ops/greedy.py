"""The most likely token of each row of logits; -1 for a row that is damaged."""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.ops._library import define


def _greedy(logits: Tensor) -> Tensor:
    largest, tokens = logits.max(-1)  # NaN and inf come through
    return torch.where(torch.isfinite(largest), tokens, -1)


_greedy_op = define("greedy(Tensor logits) -> Tensor", _greedy)


def greedy(
    logits: Tensor,  # [B, V]
) -> Tensor:  # [B] int64
    """`argmax` of every row, -1 where the row holds NaN or +inf, or nothing but -inf.

    Of equal logits the C++ implementation takes the first, torch any.
    """
    out: Tensor = _greedy_op(logits)
    return out
