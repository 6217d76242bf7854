"""The student as torch runs it forward and backward: the sub-layers from one on, over any `DecoderSpec`.

    x = x + f_i(rms_norm_i(x))      i = start .. len(sublayers) - 1

The same function as `model.Decoder`, whose ops have no gradients. The residual stream is float32; the linear layers
compute in the dtype of their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, SublayerSpec


class Parameters(Protocol):
    """Where the student's weights come from, trained or not."""

    dtype: torch.dtype

    def vector(self, name: str) -> Tensor:
        """The gain of a norm."""
        ...

    def linear(self, stem: str, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        """`x W^T + b` of the projection `stem`, such as `sublayers.3.o_proj`."""
        ...


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, S, H, D], [S, 1, D/2] float32
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:  # [S, S] bool
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


class Student:
    """Sub-layers `start` and later, and the final norm.

    Args:
        spec: of the whole pruned model.
        start: number of the first sub-layer that runs.
        parameters: their weights.
        device: where they lie.
        recompute: keep only what enters a sub-layer for the backward pass.
    """

    def __init__(
        self, spec: DecoderSpec, start: int, parameters: Parameters, device: torch.device, recompute: bool = False
    ) -> None:
        self.spec = spec
        self.start = start
        self._parameters = parameters
        self._device = device
        self._recompute = recompute
        widths = {s.head_dim for s in spec.attention_sublayers()}
        self._rotary = {width: RotaryTable(spec.rope, width, device) for width in widths}

    def states(self, states: Tensor) -> Tensor:  # [B, S, C] float32 -> the same
        """The residual stream behind the last sub-layer, from the one that enters sub-layer `start`."""
        for i in range(self.start, len(self.spec.sublayers)):
            if self._recompute and torch.is_grad_enabled():
                states = checkpoint(self._step, states, i, use_reentrant=False, preserve_rng_state=False)
            else:
                states = self._step(states, i)
        return states

    def final(self, states: Tensor) -> Tensor:  # [B, S, C] -> [B, S, C]
        """The last norm, in the dtype of the weights: what the head takes."""
        return self._normalised(states, "norm.weight")

    def _normalised(self, states: Tensor, name: str) -> Tensor:
        gain = self._parameters.vector(name)
        return rms_norm(states, gain.shape, gain, self.spec.rms_norm_eps).to(self._parameters.dtype)

    def _step(self, states: Tensor, index: int) -> Tensor:
        spec = self.spec.sublayers[index]
        hidden = self._normalised(states, f"sublayers.{index}.norm.weight")
        added: Callable[[SublayerSpec, int, Tensor], Tensor]
        added = self._attention if isinstance(spec, AttentionSpec) else self._ffn
        return states + added(spec, index, hidden).float()

    def _ffn(self, spec: SublayerSpec, index: int, hidden: Tensor) -> Tensor:  # [B, S, C] -> [B, S, C]
        assert isinstance(spec, FFNSpec)
        gate, up = self._parameters.linear(f"sublayers.{index}.gate_up_proj", hidden).chunk(2, dim=-1)
        return self._parameters.linear(f"sublayers.{index}.down_proj", silu(gate) * up)

    def _attention(self, spec: SublayerSpec, index: int, hidden: Tensor) -> Tensor:  # [B, S, C] -> [B, S, C]
        assert isinstance(spec, AttentionSpec)
        prefix, (batch, length, _) = f"sublayers.{index}.", hidden.shape
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        qkv = self._parameters.linear(f"{prefix}qkv_proj", hidden).view(batch, length, sum(heads), spec.head_dim)
        q, k, v = qkv.split(heads, dim=2)
        if spec.qk_norm:
            q, k = (
                self._head_normalised(q, f"{prefix}q_norm.weight"),
                self._head_normalised(k, f"{prefix}k_norm.weight"),
            )
        table = self._rotary[spec.head_dim].rows(length)[:length]
        cos, sin = table[:, None, 0], table[:, None, 1]  # [S, 1, D/2]
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        window = spec.sliding_window
        mask = None if window is None or window >= length else _window_mask(length, window, hidden.device)
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=spec.num_heads != spec.num_kv_heads,
        )
        return self._parameters.linear(f"{prefix}o_proj", out.transpose(1, 2).reshape(batch, length, spec.q_size))

    def _head_normalised(self, heads: Tensor, name: str) -> Tensor:  # [B, S, H, D]
        wide = rms_norm(heads.float(), heads.shape[-1:], None, self.spec.rms_norm_eps)
        return (wide * self._parameters.vector(name)).to(heads.dtype)
