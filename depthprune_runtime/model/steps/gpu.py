"""`FusedStep`: a decode step through the fused ops, five of them a block, each one launch on a GPU.

    attention   norm_qkv · paged_attention · linear_add           (with q/k-norm: norm_linear · rotary_kv_write · ...)
    FFN         norm_gated_linear · linear_add
    ends        embedding · norm_logits

It computes what `Decoder.hidden_states` and `logits` do for one new token a request, with fewer roundings in between.
Nothing in it looks at a value on the host, so a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.model.steps.unsupported import unsupported
from depthprune_runtime.model.sublayers import FFN, Attention, KVPair


@dataclass(frozen=True)
class StepState:
    """Where B requests stand; see `ops.next_tokens`, which moves them on in place."""

    ids: Tensor  # [B] int64
    positions: Tensor  # [B] int64
    slots: Tensor  # [B] int64, -1 for a row that holds no request
    context_lens: Tensor  # [B] int64, >= 1
    block_tables: Tensor  # [B, M] int64
    bounds: Tensor  # [B + 1] int64: 0 .. B, one query a request


class FusedStep:
    """The step over `decoder` and its KV cache. max_context: positions that its rotary tables hold."""

    def __init__(self, decoder: Decoder, kv: list[KVPair | None], max_context: int) -> None:
        self._decoder = decoder
        self._kv = kv
        self._tables: dict[RotaryTable, Tensor] = {}
        for sublayer in decoder.sublayers:
            if isinstance(sublayer, Attention):
                self._tables[sublayer.rotary] = sublayer.rotary.rows(max_context)

    @staticmethod
    def refuses(decoder: Decoder) -> str | None:
        """Why this step is not worth running for `decoder`, op by op being as good; None if it is."""
        if lacking := unsupported(decoder.spec):
            return f"the fused step has no {lacking}"
        key = decoder.device.type.upper()
        missing = [name for name in FusedStep.ops_used(decoder) if ops.implementations(name).get(key) != "native"]
        if not missing:
            return None
        return f"no {key} implementation of {', '.join(missing)}; install triton and build the extension where nvcc is"

    @staticmethod
    def ops_used(decoder: Decoder) -> list[str]:
        """Ops that need an implementation of the device for the step to be worth anything."""
        used = {"draw_tokens", "linear_add", "next_tokens", "norm_logits"}
        for sublayer in decoder.sublayers:
            if isinstance(sublayer, FFN):
                used.add("norm_gated_linear")
            elif sublayer.spec.qk_norm:
                used |= {"norm_linear", "rotary_kv_write", "paged_attention"}
            else:
                used |= {"norm_qkv", "paged_attention"}
        return sorted(used)

    def run(self, state: StepState) -> tuple[Tensor, Tensor, Tensor]:  # [B, V], [B, R], [B, R]
        """Logits, and what is left of their argmax (`ops.norm_logits`); keys and values go to the cache."""
        decoder = self._decoder
        residual = decoder.embed(state.ids)
        for sublayer, pair in zip(decoder.sublayers, self._kv, strict=True):
            if isinstance(sublayer, Attention):
                assert pair is not None
                self._attention(sublayer, pair, residual, state)
            else:
                self._ffn(sublayer, residual)
        head = decoder.lm_head.weight
        return ops.norm_logits(residual, decoder.norm, decoder.spec.rms_norm_eps, head)

    def _attention(self, sublayer: Attention, kv: KVPair, residual: Tensor, state: StepState) -> None:
        spec, eps = sublayer.spec, self._decoder.spec.rms_norm_eps
        table = self._tables[sublayer.rotary]
        assert sublayer.norm is not None
        weight, bias = sublayer.qkv.weight, sublayer.qkv.bias
        if spec.qk_norm:
            qkv = ops.norm_linear(residual, sublayer.norm, eps, weight, bias)
            heads = qkv.view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
            q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
            ops.rotary_kv_write(
                q, k, v, sublayer.q_norm, sublayer.k_norm, eps, table, state.positions, *kv, state.slots
            )
        else:
            q = ops.norm_qkv(residual, sublayer.norm, eps, weight, bias, table, state.positions, state.slots, *kv)
        out = ops.paged_attention(
            q, *kv, state.block_tables, state.context_lens, state.bounds, sublayer.scale, sublayer.window
        )
        ops.linear_add(out.reshape(-1, spec.q_size), residual, sublayer.o.weight, sublayer.o.bias)

    def _ffn(self, sublayer: FFN, residual: Tensor) -> None:
        eps = self._decoder.spec.rms_norm_eps
        assert sublayer.norm is not None
        inner = ops.norm_gated_linear(residual, sublayer.norm, eps, sublayer.gate_up.weight, sublayer.gate_up.bias)
        ops.linear_add(inner, residual, sublayer.down.weight, sublayer.down.bias)


def inert_state(batch: int, width: int, device: torch.device) -> StepState:
    """B rows that hold no request and tables of `width` kv_blocks: a step over it writes nothing."""

    def full(value: int, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.int64, device=device)

    return StepState(
        ids=full(0, batch),
        positions=full(0, batch),
        slots=full(-1, batch),
        context_lens=full(1, batch),
        block_tables=full(0, batch, width),
        bounds=torch.arange(batch + 1, device=device),
    )
