"""RMSNorm, alone and fused with the residual add.

    rms_norm(x, w)_tc = x_tc * rsqrt(mean_c(x_tc^2) + eps) * w_c

in float32 and rounded once; Hugging Face rounds before the gain, which doubles the error in bf16.
Source: Zhang and Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.ops._library import define


def _check(x: Tensor, weight: Tensor) -> None:
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"rms_norm: expected weight of shape [{x.shape[-1]}], got {list(weight.shape)}")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight)
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight.float()).to(x.dtype)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm: expected residual like x {list(x.shape)} {x.dtype}, "
            f"got {list(residual.shape)} {residual.dtype}"
        )
    residual.add_(x)
    return _rms_norm(residual, weight, eps)


def _head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    if x.shape[-2:] != weight.shape:
        raise ValueError(f"head_rms_norm: expected weight of shape {list(x.shape[-2:])}, got {list(weight.shape)}")
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    x.copy_(wide * rstd * weight.float())


_rms_norm_op = define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm)
_add_rms_norm_op = define(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor", _add_rms_norm
)

_head_rms_norm_op = define("head_rms_norm(Tensor(a!) x, Tensor weight, float eps) -> ()", _head_rms_norm)


def rms_norm(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    eps: float,
) -> Tensor:  # [..., C]
    """Normalised `x`, in the dtype of `x`."""
    out: Tensor = _rms_norm_op(x, weight, eps)
    return out


def add_rms_norm(
    x: Tensor,  # [T, C], the output of the sub-layer before
    residual: Tensor,  # [T, C], updated in place: residual += x
    weight: Tensor,  # [C]
    eps: float,
) -> Tensor:  # [T, C]
    """`rms_norm(residual + x)`; the sum, rounded to its dtype, stays in `residual`."""
    out: Tensor = _add_rms_norm_op(x, residual, weight, eps)
    return out


def head_rms_norm(
    x: Tensor,  # [T, H, D], normalised in place over D
    weight: Tensor,  # [H, D], one gain a head: merged blocks bring different ones
    eps: float,
) -> None:
    """The q/k-norm of Qwen3 before rotary embedding."""
    _head_rms_norm_op(x, weight, eps)
