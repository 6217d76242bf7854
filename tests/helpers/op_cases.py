"""Inputs of every op at shapes that models have, and how to check an implementation on them.

    verify(case, torch.bfloat16, torch.device("cuda"))

runs the op as a model would. Whatever it writes is compared by the tolerance rule of accuracy.py: truth is the op's
reference over the same values in float64 on the CPU (norm and rotary compute in float32 whatever comes), the baseline
is the reference in the dtype of the inputs. Every tensor lies between guards of NaN, new tensors start as NaN, and a
second run on the same inputs must give the same bits. A new op needs one line in CASES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accuracy import assert_as_accurate
from decode_cases import DECODE_CASES
from op_case import Arguments, Case, Draw, named_cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from depthprune_runtime.model.rope import RotaryTable
from depthprune_runtime.ops._library import NAMESPACE, REFERENCES
from depthprune_runtime.spec import RopeSpec

GUARD = 64  # elements: keeps the alignment of what lies between
CPU = torch.device("cpu")

EXACT = ("draw_tokens", "greedy", "kv_write", "next_tokens")  # nothing is computed: equal bits


class _References(TorchDispatchMode):
    """Runs the ops that a reference is made of as plain torch, too, so that no kernel is its own truth."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        with self:
            return REFERENCES[func.name().split("::")[1]](*args, **(kwargs or {}))


def plain(op: str) -> Callable[..., Any]:
    """`op` in plain torch, on any device and in any dtype."""

    def call(*arguments: Any) -> Any:
        with _References():
            return REFERENCES[op](*arguments)

    return call


def _norm(tokens: int, size: int) -> Callable[[Draw], Arguments]:
    return lambda draw: (draw(tokens, size, outlier=True), draw(size), 1e-5)


def _add_norm(tokens: int, size: int) -> Callable[[Draw], Arguments]:
    return lambda draw: (draw(tokens, size, outlier=True), draw(tokens, size), draw(size), 1e-5)


def _packed(draw: Draw, tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    """q, k and v as the model makes them: views of one projection."""
    return draw(tokens, heads + 2 * kv_heads, dim).split((heads, kv_heads, kv_heads), dim=1)


def _head_norm(tokens: int, heads: int, dim: int) -> Callable[[Draw], Arguments]:
    return lambda draw: (_packed(draw, tokens, heads, 2, dim)[0], draw(heads, dim), 1e-6)


def _rotary(tokens: int, heads: int, kv_heads: int, dim: int) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        q, k, _ = _packed(draw, tokens, heads, kv_heads, dim)
        return q, k, RotaryTable(RopeSpec(), dim, CPU).rows(4096), draw.permutation(4096)[:tokens]

    return build


def _kv_write(tokens: int, kv_heads: int, dim: int) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        _, k, v = _packed(draw, tokens, kv_heads, kv_heads, dim)
        pages = tokens // 16 + 3
        caches = [draw(pages, 16, kv_heads, dim) for _ in range(2)]
        return k, v, *caches, draw.permutation(pages * 16)[:tokens]

    return build


def _rotary_kv_write(
    tokens: int, heads: int, kv_heads: int, dim: int, qk_norm: bool = False
) -> Callable[[Draw], Arguments]:
    """Every fourth token is stored nowhere."""

    def build(draw: Draw) -> Arguments:
        q, k, v = _packed(draw, tokens, heads, kv_heads, dim)
        gains = (draw(heads, dim), draw(kv_heads, dim)) if qk_norm else (None, None)
        pages = tokens // 16 + 3
        caches = [draw(pages, 16, kv_heads, dim) for _ in range(2)]
        positions, slots = draw.permutation(4096)[:tokens], draw.permutation(pages * 16)[:tokens]
        slots[3::4] = -1
        return q, k, v, *gains, 1e-6, RotaryTable(RopeSpec(), dim, CPU).rows(4096), positions, *caches, slots

    return build


def _varlen(
    lengths: Sequence[int], heads: int, kv_heads: int, dim: int, window: int = 0
) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        return *_packed(draw, sum(lengths), heads, kv_heads, dim), bounds, dim**-0.5, window

    return build


def _paged(
    contexts: Sequence[int], heads: int, kv_heads: int, dim: int, new: Sequence[int] | int = 1, window: int = 0
) -> Callable[[Draw], Arguments]:
    """Pages of 16 tokens in any order; what no request has written is NaN."""

    def build(draw: Draw) -> Arguments:
        counts = [-(-c // 16) for c in contexts]
        order = draw.permutation(sum(counts) + 2)
        tables = torch.zeros(len(contexts), max(counts), dtype=torch.int64)
        caches = [torch.full((len(order), 16, kv_heads, dim), torch.nan, dtype=draw.dtype) for _ in range(2)]
        used = 0
        for row, (count, length) in enumerate(zip(counts, contexts, strict=True)):
            tables[row, :count] = order[used : used + count]
            positions = torch.arange(length)
            slots = tables[row, positions // 16] * 16 + positions % 16
            for cache in caches:
                cache.flatten(0, 1)[slots] = draw(length, kv_heads, dim)
            used += count
        queries = [new] * len(contexts) if isinstance(new, int) else list(new)
        q = _packed(draw, sum(queries), heads, kv_heads, dim)[0]
        bounds = torch.tensor([0, *queries]).cumsum(0)
        return q, *caches, tables, torch.tensor(contexts), bounds, dim**-0.5, window

    return build


def _linear(tokens: int, inputs: int, outputs: int, bias: bool = False) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        x = draw(tokens, inputs, scale=0.1, outlier=True)
        return x, draw(outputs, inputs, scale=inputs**-0.5), draw(outputs) if bias else None

    return build


def _greedy(rows: int, size: int) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        logits = draw(rows, size)
        logits[torch.arange(rows), draw.permutation(size)[:rows]] = 20.0  # one winner: of equal logits any may win
        if rows > 2:
            logits[0, size // 2], logits[1, 0] = torch.nan, torch.inf
            logits[2] = -torch.inf
        return (logits,)

    return build


# Hidden sizes, heads and widths of SmolLM2-135M, Llama-2-7B, Llama-3-8B, and of two of their blocks merged.
CASES: dict[str, list[Case]] = {
    "rms_norm": named_cases("rms_norm", _norm, (1, 576), (5, 4096), (3, 577), (0, 64), big=[(2048, 4096), (64, 8192)]),
    "add_rms_norm": named_cases("add_rms_norm", _add_norm, (1, 576), (5, 4096), (3, 577), big=[(2048, 4096)]),
    "head_rms_norm": named_cases(
        "head_rms_norm", _head_norm, (1, 9, 64), (5, 32, 128), (3, 3, 96), big=[(2048, 32, 128)]
    ),
    "rotary": named_cases("rotary", _rotary, (1, 9, 3, 64), (5, 32, 8, 128), (3, 2, 1, 72), big=[(2048, 64, 16, 128)]),
    "rotary_kv_write": named_cases(
        "rotary_kv_write", _rotary_kv_write, (1, 9, 3, 64), (5, 32, 8, 128, True), (3, 2, 1, 72, True),
        big=[(2048, 64, 16, 128), (300, 32, 8, 128, True)],
    ),
    "kv_write": named_cases("kv_write", _kv_write, (1, 3, 64), (37, 8, 128), (5, 1, 72), big=[(2048, 32, 128)]),
    "silu_mul": named_cases(
        "silu_mul", lambda t, f: lambda draw: (draw(t, 2 * f),), (1, 1536), (5, 77), big=[(2048, 11008)]
    ),
    "linear": named_cases(
        "linear", _linear, (1, 576, 960), (1, 576, 576, True), (5, 576, 192), (3, 72, 40, True), (17, 128, 96),
        (70, 64, 33),
        big=[(1, 4096, 12288), (1, 11008, 4096), (1, 4096, 128256), (8, 4096, 22016), (64, 4096, 6144, True),
             (200, 4096, 4096)],
    ),
    "gated_linear": named_cases(
        "gated_linear", _linear, (1, 576, 384), (17, 128, 96), (66, 72, 80, True), (130, 72, 80), (300, 577, 1530),
        big=[(2048, 4096, 22016), (512, 4096, 28672), (100, 4096, 44032), (512, 576, 3072, True), (1, 4096, 22016)],
    ),
    **DECODE_CASES,
    "greedy": named_cases("greedy", _greedy, (1, 49152), (5, 1000), big=[(64, 128256)]),
    "varlen_attention": named_cases(
        "varlen_attention", _varlen, ([7], 9, 3, 64), ([1, 33, 16], 4, 2, 128), ([40, 5], 12, 4, 96),
        ([50], 4, 4, 64, 12),
        big=[([2048], 32, 8, 128), ([512, 300], 32, 32, 128), ([1000], 64, 16, 128, 256)],
    ),
    "paged_attention": named_cases(
        "paged_attention", _paged, ([7], 9, 3, 64), ([1, 33, 16], 4, 2, 128), ([40, 75], 12, 4, 96),
        ([50], 4, 4, 64, 1, 12), ([40, 9], 8, 2, 64, [5, 1]),
        big=[([4096], 32, 8, 128), ([4096, 512, 17, 1, 700, 2000, 333, 64], 32, 32, 128),
             ([4000] * 2, 64, 16, 128, 1, 1024)],
    ),
}  # fmt: skip
CASES = {op: cases for op, cases in CASES.items() if op in REFERENCES}  # a fused op may not be defined here


def written(op: str) -> list[int]:
    """Positions of the arguments that the schema says are written."""
    schema = getattr(torch.ops.depthprune, op).default._schema
    return [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def outputs(op: str, call: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """Everything that a call gives or changes."""
    returned = call(*arguments)
    found = [] if returned is None else list(returned) if isinstance(returned, tuple) else [returned]
    if op == "norm_logits":
        found.pop()  # which of two logits a rounding apart is the larger may differ
    return found + [arguments[i] for i in written(op)]


def _each(function: Callable[[Tensor], Tensor], argument: Any) -> Any:
    """`function` of a tensor, or of every tensor of a list; other arguments as they are."""
    if isinstance(argument, list):
        return [_each(function, a) for a in argument]
    return function(argument) if isinstance(argument, Tensor) else argument


def guarded(t: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(`t` on `device` with its strides, the memory around it): NaN before and behind, zeros for integers."""
    base = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())  # type: ignore[call-overload]
    around = torch.full((base.numel() + 2 * GUARD,), torch.nan if t.is_floating_point() else 0, dtype=t.dtype)
    around[GUARD : GUARD + base.numel()] = base
    around = around.to(device)
    return around.as_strided(t.shape, t.stride(), t.storage_offset() + GUARD), around


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _quantised(argument: Any) -> bool:
    return isinstance(argument, list) and len(argument) > 1 and isinstance(argument[0], Tensor)


def _bits(t: Tensor) -> Tensor:
    return t.detach().to(CPU).contiguous().view(torch.uint8)


def verify(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Fail unless the op on `device` is as accurate as plain torch, in bounds, and the same every time."""
    op = getattr(torch.ops.depthprune, case.op).default
    given = case.arguments(dtype)
    runs = []
    for _ in range(2):
        places: list[Any] = [
            guarded(a, device) if isinstance(a, Tensor) else (_each(lambda t: t.to(device), a), None) for a in given
        ]
        with poisoned_memory():
            found = outputs(case.op, op, tuple(a for a, _ in places))
        for index in written(case.op):
            around = places[index][1]
            edges = torch.cat([around[:GUARD], around[-GUARD:]])
            kept = edges.isnan() if edges.is_floating_point() else edges == 0
            assert bool(kept.all()), f"{case}: wrote beyond argument {index}"
        runs.append(found)
    for i, (first, second) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(_bits(first), _bits(second)), f"{case}: output {i} differs from run to run"
    # `.to` would make q, k and v contiguous, which only the speed of plain torch may notice
    baseline_arguments = tuple(_each(lambda t: t.to(device, copy=True), a) for a in given)
    baseline = outputs(case.op, plain(case.op), baseline_arguments)
    if case.op in EXACT:
        for i, (actual, expected) in enumerate(zip(runs[0], baseline, strict=True)):
            assert torch.equal(_bits(actual), _bits(expected)), f"{case}: output {i} is not exact"
        return
    # scales keep their dtype: they are exact, and say how codes are stored
    wide = tuple(
        _each(lambda t: t.double() if t.is_floating_point() else t, a) if not _quantised(a) else a for a in given
    )
    truth = outputs(case.op, plain(case.op), wide)
    for i, (actual, same, true) in enumerate(zip(runs[0], baseline, truth, strict=True)):
        assert_as_accurate(actual.to(CPU), same.to(CPU), true, f"{case}: output {i}")
