"""The gated activation of the FFN: `act(gate) * up`. Source: Shazeer, arXiv 2002.05202."""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.ops._library import define


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    # torch's silu computes bf16 and fp16 in float32 inside; one rounding of silu remains
    return torch.nn.functional.silu(gate).mul_(up)


_silu_mul_op = define("silu_mul(Tensor gate_up) -> Tensor", _silu_mul)


def silu_mul(
    gate_up: Tensor,  # [T, 2F], gate channels first
) -> Tensor:  # [T, F]
    """`silu(gate) * up`, the inner activations psi of the FFN."""
    out: Tensor = _silu_mul_op(gate_up)
    return out


def gelu_tanh_mul(
    gate_up: Tensor,  # [T, 2F], gate channels first
) -> Tensor:  # [T, F]
    """`gelu(gate) * up` with the tanh form of GELU, as Gemma has it. No kernel of ours has it yet."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up)
