"""The decode projections compile at the shapes of real models, keep their values in registers and load 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: ahead-of-time compilation is not checked")

from ahead_of_time import check, record

from depthprune_runtime.kernels import draw_tokens, linear_add, next_tokens, norm_linear, norm_qkv, rotary_kv_write
from depthprune_runtime.weights.quantized import QuantSpec
from depthprune_runtime.weights.weight import Format

# hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size
MODELS = {
    "llama-2-7b": (4096, 32, 32, 128, 11008, 32000),
    "llama-3-8b": (4096, 32, 8, 128, 14336, 128256),
    "merged 7b": (4096, 64, 64, 128, 22016, 32000),
    "smollm2": (576, 9, 3, 64, 1536, 49152),
}
KINDS = {"bf16": None, "int8": QuantSpec(8, 64), "int4": QuantSpec(4, 32), "int4 asymmetric": QuantSpec(4, 128, False)}
OPS = ("norm_qkv", "norm_gated_linear", "linear_add o", "linear_add down", "norm_logits")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def packed(kind: str, rows: int, columns: int) -> tuple[list[Tensor], list[int]]:
    spec = KINDS[kind]
    if spec is None:
        return [meta(rows, columns)], [rows, int(Format.ROWS), 0, 0]
    dtypes = {"codes": torch.uint8, "scales": torch.bfloat16, "zeros": torch.uint8}
    tensors = [meta(*shape, dtype=dtypes[name]) for name, shape in spec.shapes(rows, columns).items()]
    return tensors, [rows, int(Format.CODES), spec.bits, spec.group_size]


def call(op: str, model: str, kind: str, tokens: int) -> Callable[[], Any]:
    size, heads, kv_heads, dim, channels, vocab = MODELS[model]
    x, gain = meta(tokens, size), meta(size)
    if op == "norm_qkv":
        weight = packed(kind, (heads + 2 * kv_heads) * dim, size)
        cache, longs = meta(64, 16, kv_heads, dim), meta(tokens, dtype=torch.int64)
        table = meta(4096, 2, dim // 2, dtype=torch.float32)
        return lambda: norm_qkv.norm_qkv(x, gain, 1e-5, *weight, None, table, longs, longs, cache, cache)
    if op == "norm_gated_linear":
        weight = packed(kind, 2 * channels, size)
        return lambda: norm_linear.norm_gated_linear(x, gain, 1e-5, *weight, None)
    if op == "norm_logits":
        weight = packed(kind, vocab, size)
        return lambda: norm_linear.norm_logits(x, gain, 1e-5, *weight)
    inner = meta(tokens, heads * dim if op.endswith("o") else channels)
    weight = packed(kind, size, inner.shape[1])
    return lambda: linear_add.linear_add(inner, x, *weight, None)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


# 2 to 16 tokens are one configuration
CASES = [
    *((op, model, "bf16", 1, 90) for op in OPS for model in MODELS),
    *((op, model, "bf16", 64, 90) for op in OPS for model in ("llama-2-7b", "llama-3-8b")),
    *((op, "llama-2-7b", "bf16", tokens, 80) for op in OPS for tokens in (8, 64)),
    *((op, "llama-2-7b", kind, tokens, 90) for op in OPS for kind in ("int8", "int4") for tokens in (1, 8)),
    *((op, "llama-2-7b", "int4 asymmetric", 1, 80) for op in OPS),
]


@pytest.mark.parametrize(("op", "model", "kind", "tokens", "capability"), CASES)
def test_no_spills(op: str, model: str, kind: str, tokens: int, capability: int, tmp_path: Path) -> None:
    (launch,) = record(call(op, model, kind, tokens), capability)
    check(launch, capability, tmp_path, vector_loads=True)


@pytest.mark.parametrize("capability", [80, 90])
def test_next_tokens(capability: int, tmp_path: Path) -> None:
    longs = [meta(8, dtype=torch.int64) for _ in range(5)]
    best, candidates = meta(8, 2000, dtype=torch.float32), meta(8, 2000, dtype=torch.int32)
    stop_ids, tables, tokens = meta(8, 3, dtype=torch.int64), meta(8, 256, dtype=torch.int64), meta(16, 8).long()
    for drawn in (None, longs[0]):
        arguments = (best, candidates, drawn, stop_ids, tables, 16, *longs, tokens)
        (launch,) = record(lambda arguments=arguments: next_tokens.next_tokens(*arguments), capability)
        check(launch, capability, tmp_path)
    logits, uniform = meta(8, 128256), meta(16, 8, dtype=torch.float64)
    temperatures = meta(8, dtype=torch.float32)
    (launch,) = record(lambda: draw_tokens.draw_tokens(logits, temperatures, uniform, longs[0]), capability)
    check(launch, capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (32, 32, 80)])
def test_rotary_kv_write(heads: int, kv_heads: int, dim: int, capability: int, tmp_path: Path) -> None:
    q, k, v = meta(8, heads + 2 * kv_heads, dim).split((heads, kv_heads, kv_heads), dim=1)
    table, longs, cache = meta(4096, 2, dim // 2, dtype=torch.float32), meta(8).long(), meta(64, 16, kv_heads, dim)
    for gains in ((meta(heads, dim), meta(kv_heads, dim)), (None, None)):
        (launch,) = record(
            lambda gains=gains: rotary_kv_write.rotary_kv_write(
                q, k, v, *gains, 1e-5, table, longs, cache, cache, longs
            ),
            capability,
        )
        check(launch, capability, tmp_path)
