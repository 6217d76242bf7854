"""The fused decode projections of bench_gpu.py, dense and quantised, beside what torch needs for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from on_gpu import kernels
from on_gpu.kernels import PAGE, Kernel
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from depthprune_runtime import ops
from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

OPS = ("norm_qkv", "norm_gated_linear", "linear_add", "norm_logits")
PRECISIONS = {"bf16": None, "int8": QuantSpec(8, 64), "int4": QuantSpec(4, 32)}
Make = Callable[[], Kernel]


def quantised(spec: QuantSpec, rows: int, columns: int, device: torch.device) -> QuantizedWeight:
    """Random codes: speed does not depend on them."""
    shapes = spec.shapes(rows, columns)
    codes = torch.randint(0, 256, shapes["codes"], dtype=torch.uint8, device=device)
    scales = torch.full(shapes["scales"], 0.04 / spec.levels, dtype=torch.bfloat16, device=device)
    return QuantizedWeight(spec, rows, columns, codes, scales)


class Shapes(kernels.Shapes):
    """The kernels of `kernels`, and those of a decode step. The peer always multiplies by bf16 weights."""

    def _weights(self, precision: str, rows: int, columns: int) -> tuple[Tensor | QuantizedWeight, Tensor, int]:
        """(ours, the peer's, bytes of ours)"""
        spec = PRECISIONS[precision]
        if spec is None:
            dense = self._draw(rows, columns, scale=0.02)
            return dense, dense, dense.nbytes
        weight = quantised(spec, rows, columns, self._device)
        return weight, weight.dense(self._dtype), weight.nbytes

    def _each(self, make: Callable[[int, str], Kernel]) -> Iterator[Make]:
        for precision in PRECISIONS:
            yield from (partial(make, tokens, precision) for tokens in self._sizes.batches)

    def _norm_qkv(self) -> Iterator[Make]:
        size, eps = self._spec.hidden_size, self._spec.rms_norm_eps
        heads, kv_heads, dim = self._attention.num_heads, self._attention.num_kv_heads, self._attention.head_dim

        def make(tokens: int, precision: str) -> Kernel:
            rows = (heads + 2 * kv_heads) * dim
            weight, theirs, nbytes = self._weights(precision, rows, size)
            x, gain = self._draw(tokens, size), self._draw(size)
            table = RotaryTable(self._spec.rope, dim, self._device).rows(256)
            caches = [self._draw(tokens, PAGE, kv_heads, dim) for _ in range(2)]
            positions = torch.arange(tokens, device=self._device)
            slots = positions * PAGE

            def peer() -> Tensor:  # the projection alone: rotary and cache are several launches more
                return linear(rms_norm(x, (size,), gain, eps), theirs)[:, : heads * dim]

            def ours() -> Tensor:
                return ops.norm_qkv(x, gain, eps, weight, None, table, positions, slots, *caches)

            moved = nbytes + (2 * x.numel() + tokens * rows) * x.itemsize
            shape = f"{precision} T={tokens} K={size} N={rows}"
            return Kernel("norm_qkv", shape, ours, peer, "torch norm, cuBLAS", moved)

        return self._each(make)

    def _norm_gated_linear(self) -> Iterator[Make]:
        size, eps, channels = self._spec.hidden_size, self._spec.rms_norm_eps, self._ffn.intermediate_size

        def make(tokens: int, precision: str) -> Kernel:
            weight, theirs, nbytes = self._weights(precision, 2 * channels, size)
            x, gain = self._draw(tokens, size), self._draw(size)

            def peer() -> Tensor:
                gate, up = linear(rms_norm(x, (size,), gain, eps), theirs).chunk(2, dim=-1)
                return silu(gate).mul_(up)

            moved = nbytes + (x.numel() + tokens * channels) * x.itemsize
            shape = f"{precision} T={tokens} K={size} F={channels}"
            return Kernel(
                "norm_gated_linear",
                shape,
                lambda: ops.norm_gated_linear(x, gain, eps, weight),
                peer,
                "torch norm, cuBLAS, silu, mul",
                moved,
            )

        return self._each(make)

    def _linear_add(self) -> Iterator[Make]:
        size = self._spec.hidden_size

        def make(inputs: int, tokens: int, precision: str) -> Kernel:
            weight, theirs, nbytes = self._weights(precision, size, inputs)
            x, sums = self._draw(tokens, inputs, scale=0.01), self._draw(2, tokens, size)

            def ours() -> Tensor:
                ops.linear_add(x, sums[0], weight)
                return sums[0]

            moved = nbytes + (x.numel() + 2 * tokens * size) * x.itemsize
            shape = f"{precision} T={tokens} K={inputs} N={size}"
            return Kernel("linear_add", shape, ours, lambda: sums[1].add_(linear(x, theirs)), "cuBLAS, add", moved)

        for inputs in dict.fromkeys((self._attention.q_size, self._ffn.intermediate_size)):
            yield from self._each(partial(make, inputs))

    def _norm_logits(self) -> Iterator[Make]:
        size, eps, vocabulary = self._spec.hidden_size, self._spec.rms_norm_eps, self._spec.vocab_size

        def make(tokens: int, precision: str) -> Kernel:
            weight, theirs, nbytes = self._weights(precision, vocabulary, size)
            x, gain = self._draw(tokens, size), self._draw(size)

            def peer() -> Tensor:
                logits = linear(rms_norm(x, (size,), gain, eps), theirs)
                logits.argmax(-1)
                return logits

            moved = nbytes + (x.numel() + tokens * vocabulary) * x.itemsize
            shape = f"{precision} T={tokens} K={size} V={vocabulary}"
            return Kernel(
                "norm_logits",
                shape,
                lambda: ops.norm_logits(x, gain, eps, weight)[0],
                peer,
                "torch norm, cuBLAS, argmax",
                moved,
            )

        return self._each(make)
