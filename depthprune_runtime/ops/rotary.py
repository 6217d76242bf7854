"""Rotary position embedding, in place. Source: Su et al., arXiv 2104.09864, in the half-split layout.

For a head vector (a, b) split in halves:  a' = a cos - b sin,  b' = b cos + a sin.
"""

from __future__ import annotations

from torch import Tensor

from depthprune_runtime.ops._library import define


def _rotary(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    rows = cos_sin[positions]  # [T, 2, D/2]
    cos, sin = rows[:, None, 0], rows[:, None, 1]  # [T, 1, D/2]
    half = cos.shape[-1]
    for x in (q, k):
        a, b = x[..., :half].float(), x[..., half:].float()
        rotated_a = a * cos - b * sin
        rotated_b = b * cos + a * sin
        x[..., :half].copy_(rotated_a)
        x[..., half:].copy_(rotated_b)


_rotary_op = define("rotary(Tensor(a!) q, Tensor(b!) k, Tensor cos_sin, Tensor positions) -> ()", _rotary)


def rotary(
    q: Tensor,  # [T, H, D], rotated in place
    k: Tensor,  # [T, K, D], rotated in place
    cos_sin: Tensor,  # [S, 2, D/2] float32
    positions: Tensor,  # [T] int64, < S
) -> None:
    """Rotate queries and keys to their positions."""
    _rotary_op(q, k, cos_sin, positions)
