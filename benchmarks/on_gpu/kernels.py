"""Kernels of bench_gpu.py at the shapes of real models, each beside torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu
from torch.nn.functional import scaled_dot_product_attention as sdpa

from depthprune_runtime import ops
from depthprune_runtime.spec import DecoderSpec

PAGE = 16
Run = Callable[[], Any]


@dataclass
class Kernel:
    """One op at one shape. nbytes: fewest that must move; flops: of the products; limit: what should bound it."""

    op: str
    shape: str
    ours: Run
    peer: Run
    peer_name: str
    nbytes: int
    flops: int = 0
    limit: str = field(default="bandwidth")  # or matmul


@dataclass(frozen=True)
class Sizes:
    """Which token counts, contexts and batches to run."""

    prefill: int = 2048
    contexts: tuple[int, ...] = (512, 4096)
    batches: tuple[int, ...] = (1, 8, 64)


class Shapes:
    """Makes the kernels of one model, one at a time: their tensors go before the next come."""

    def __init__(self, spec: DecoderSpec, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self._spec = spec
        self._sizes = sizes
        self._device = device
        self._dtype = dtype
        self._attention = spec.attention_sublayers()[0]
        self._ffn = spec.ffn_sublayers()[0]

    def of(self, op: str) -> Iterator[Callable[[], Kernel]]:
        yield from getattr(self, f"_{op}")()

    def _draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype) * scale

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _tokens(self) -> list[int]:
        return [1, self._sizes.prefill]

    def _rms_norm(self) -> Iterator[Callable[[], Kernel]]:
        size, eps = self._spec.hidden_size, self._spec.rms_norm_eps

        def make(tokens: int) -> Kernel:
            x, weight = self._draw(tokens, size), self._draw(size)
            moved = (2 * tokens + 1) * size * x.itemsize
            ours, peer = lambda: ops.rms_norm(x, weight, eps), lambda: rms_norm(x, (size,), weight, eps)
            return Kernel("rms_norm", f"T={tokens} C={size}", ours, peer, "torch", moved)

        yield from (lambda t=t: make(t) for t in self._tokens())

    def _add_rms_norm(self) -> Iterator[Callable[[], Kernel]]:
        size, eps = self._spec.hidden_size, self._spec.rms_norm_eps

        def make(tokens: int) -> Kernel:
            x, weight, sums = self._draw(tokens, size, scale=0.01), self._draw(size), self._draw(2, tokens, size)
            moved = (4 * tokens + 1) * size * x.itemsize
            return Kernel(
                "add_rms_norm",
                f"T={tokens} C={size}",
                lambda: ops.add_rms_norm(x, sums[0], weight, eps),
                lambda: rms_norm(sums[1].add_(x), (size,), weight, eps),
                "torch",
                moved,
            )

        yield from (lambda t=t: make(t) for t in self._tokens())

    def _gated_linear(self) -> Iterator[Callable[[], Kernel]]:
        size, channels = self._spec.hidden_size, self._ffn.intermediate_size

        def make(tokens: int, width: int) -> Kernel:
            x, weight = self._draw(tokens, size), self._draw(2 * width, size, scale=0.02)

            def peer() -> Tensor:
                gate, up = linear(x, weight).chunk(2, dim=-1)
                return silu(gate).mul_(up)

            moved = (x.numel() + weight.numel() + tokens * width) * x.itemsize
            flops = 4 * tokens * size * width
            shape = f"T={tokens} C={size} F={width}"
            return Kernel(
                "gated_linear",
                shape,
                lambda: ops.gated_linear(x, weight),
                peer,
                "cuBLAS, silu, mul",
                moved,
                flops,
                "matmul",
            )

        tokens = self._sizes.prefill
        yield from (lambda w=w: make(tokens, w) for w in (channels, 2 * channels))  # and two FFNs concatenated

    def _varlen_attention(self) -> Iterator[Callable[[], Kernel]]:
        def make(merged: int) -> Kernel:
            tokens, dim = self._sizes.prefill, self._attention.head_dim
            heads, kv_heads = merged * self._attention.num_heads, merged * self._attention.num_kv_heads
            packed = self._draw(tokens, heads + 2 * kv_heads, dim)
            q, k, v = packed.split((heads, kv_heads, kv_heads), dim=1)
            bounds, scale = self._ints([0, tokens]), dim**-0.5
            turned = [t.transpose(0, 1)[None].contiguous() for t in (q, k, v)]
            gqa = heads != kv_heads
            moved = (packed.numel() + q.numel()) * packed.itemsize
            return Kernel(
                "varlen_attention",
                f"T={tokens} H={heads} K={kv_heads} D={dim}",
                lambda: ops.varlen_attention(q, k, v, bounds, scale),
                lambda: sdpa(*turned, is_causal=True, scale=scale, enable_gqa=gqa),
                "SDPA",
                moved,
                2 * heads * dim * tokens * (tokens + 1),
                "matmul",
            )

        yield from (lambda m=m: make(m) for m in (1, 2))  # and two attentions merged

    def _paged_attention(self) -> Iterator[Callable[[], Kernel]]:
        heads, kv_heads, dim = self._attention.num_heads, self._attention.num_kv_heads, self._attention.head_dim

        def make(batch: int, context: int) -> Kernel:
            pages = -(-context // PAGE)
            q = self._draw(batch, heads, dim)
            k_cache, v_cache = (self._draw(batch * pages, PAGE, kv_heads, dim) for _ in range(2))
            tables = torch.randperm(batch * pages, device=self._device).view(batch, pages)
            lengths, bounds, scale = self._ints([context] * batch), self._ints(list(range(batch + 1))), dim**-0.5
            keys, values = (self._draw(batch, kv_heads, context, dim) for _ in range(2))
            query, gqa = q[:, :, None], heads != kv_heads
            moved = (2 * q.numel() + 2 * keys.numel()) * q.itemsize
            return Kernel(
                "paged_attention",
                f"B={batch} S={context} H={heads} K={kv_heads} D={dim}",
                lambda: ops.paged_attention(q, k_cache, v_cache, tables, lengths, bounds, scale),
                lambda: sdpa(query, keys, values, scale=scale, enable_gqa=gqa),
                "SDPA, no pages",
                moved,
            )

        yield from (lambda b=b, s=s: make(b, s) for s in self._sizes.contexts for b in self._sizes.batches)

    def _linear(self) -> Iterator[Callable[[], Kernel]]:
        shapes = self._spec.projections()
        named = {name.split(".")[-2]: shape for name, shape in shapes.items()}  # one of each kind

        def make(name: str, outputs: int, inputs: int, tokens: int) -> Kernel:
            x, weight = self._draw(tokens, inputs), self._draw(outputs, inputs, scale=0.02)
            moved = (x.numel() + weight.numel() + tokens * outputs) * x.itemsize
            shape = f"{name} T={tokens} K={inputs} N={outputs}"
            return Kernel("linear", shape, lambda: ops.linear(x, weight), lambda: linear(x, weight), "cuBLAS", moved)

        for name, (outputs, inputs) in named.items():
            yield from (lambda n=name, o=outputs, i=inputs, t=t: make(n, o, i, t) for t in self._sizes.batches)


OPS = ("rms_norm", "add_rms_norm", "gated_linear", "varlen_attention", "paged_attention", "linear")


def machine(device: torch.device, quick: bool) -> dict[str, tuple[Run, float]]:
    """What the machine can do: name -> (call, bytes moved or operations done)."""
    on_gpu = device.type == "cuda"
    size = (2 << 30) if on_gpu and not quick else (1 << 29) if on_gpu else (1 << 20)
    edge = 8192 if on_gpu else 128
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(edge, edge, device=device).bfloat16() for _ in range(2))
    return {
        "copy": (lambda: target.copy_(source), 2.0 * size),
        "read": (source.sum, float(size)),
        "matmul_bf16": (lambda: a @ b, 2.0 * edge**3),
    }
