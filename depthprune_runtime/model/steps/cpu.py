"""`DecodeStep`: a decode step of the whole decoder in one C++ call; op by op, Python would cost as much as the work.

It does what `Decoder.hidden_states` and `logits` do with paged attention and one new token a request, by the same
kernels with the same roundings: the logits are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from depthprune_runtime.host.extension import extension
from depthprune_runtime.model.batch import Batch
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.model.linear import Linear
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.model.steps.unsupported import unsupported
from depthprune_runtime.model.sublayers import Attention, KVPair
from depthprune_runtime.weights.packed import pack

if TYPE_CHECKING:
    from depthprune_runtime import _C


class DecodeStep:
    """The step over `decoder`, which it must not refuse, and its KV cache."""

    def __init__(self, decoder: Decoder, kv: Sequence[KVPair | None]) -> None:
        module = extension()
        assert module is not None
        self._module = module
        self._rotary: list[RotaryTable] = []
        builder: _C.StepBuilder = module.StepBuilder(decoder.dtype, decoder.spec.hidden_size, decoder.spec.rms_norm_eps)
        for sublayer, pair in zip(decoder.sublayers, kv, strict=True):
            if isinstance(sublayer, Attention):
                assert pair is not None
                self._add_attention(builder, sublayer, pair)
            else:
                assert sublayer.norm is not None
                builder.add_ffn(sublayer.norm, self._linear(sublayer.gate_up), self._linear(sublayer.down))
        embedding = self._linear(Linear(decoder.embed_tokens))
        builder.set_ends(embedding, decoder.norm, self._linear(decoder.lm_head))
        self._step: _C.DecodeStep = module.DecodeStep(builder)

    @staticmethod
    def refuses(decoder: Decoder) -> str | None:
        """Why this step cannot run `decoder`; None if it can."""
        if decoder.device.type != "cpu":
            return f"the C++ decode step is for the CPU, and the model is on {decoder.device}"
        if extension() is None:
            return "the C++ extension is not in use"
        if missing := unsupported(decoder.spec):
            return f"the C++ decode step has no {missing}"
        if not decoder.rounds_inputs:
            return "the C++ decode step rounds the inputs of quantised weights to 8 bits, which `activations` forbids"
        return None

    @property
    def max_tokens(self) -> int:
        """Most requests of a step; more go through the ops, whose matrix products are the better ones then."""
        return self._step.max_tokens()

    def logits(
        self,
        ids: Tensor,  # [B] int64
        batch: Batch,  # one new token a request, paged
    ) -> Tensor:  # [B, V]
        """Logits of every request's new token, whose key and value are written to the cache. Releases the GIL."""
        paged = batch.paged
        assert paged is not None
        tables = [table.rows(batch.max_position + 1) for table in self._rotary]
        return self._step.run(ids, batch.positions, paged.slot_mapping, paged.block_tables, paged.context_lens, tables)

    def greedy_tokens(
        self,
        ids: Tensor,  # [B] int64
        positions: Tensor,  # [B] int64
        block_tables: Tensor,  # [B, M] int64, with room for all steps
        stop_ids: Tensor,  # [B, E] int64, padded with -1
        steps: int,
        seconds: float,
    ) -> Tensor:  # [N, B] int64, 1 <= N <= steps
        """The most likely next tokens of up to `steps` steps, by the rule of `ops.greedy`; -1: not finite.

        The last step is the one in which a request met a stop id or logits that are not finite, and none begins later
        than `seconds` after the first. Releases the GIL.
        """
        tables = [table.rows(int(positions.max()) + steps) for table in self._rotary]
        return self._step.ahead(ids, positions, block_tables, tables, stop_ids, steps, seconds)

    def _add_attention(self, builder: _C.StepBuilder, sublayer: Attention, pair: KVPair) -> None:
        if sublayer.rotary not in self._rotary:
            self._rotary.append(sublayer.rotary)
        assert sublayer.norm is not None
        builder.add_attention(
            norm=sublayer.norm,
            qkv=self._linear(sublayer.qkv),
            o=self._linear(sublayer.o),
            q_norm=sublayer.q_norm,
            k_norm=sublayer.k_norm,
            num_heads=sublayer.spec.num_heads,
            num_kv_heads=sublayer.spec.num_kv_heads,
            head_dim=sublayer.spec.head_dim,
            scale=sublayer.scale,
            window=sublayer.window,
            rotary=self._rotary.index(sublayer.rotary),
            k_cache=pair[0],
            v_cache=pair[1],
        )

    def _linear(self, linear: Linear) -> _C.StepLinear:
        parts, (rows, number, bits, group_size) = pack(linear.weight)
        step_linear: _C.StepLinear = self._module.StepLinear(
            parts, linear.bias, rows, linear.weight.in_features, number, bits, group_size
        )
        return step_linear
