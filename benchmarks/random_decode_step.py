"""One decode step of any spec over random weights, as the engine runs it: for profiles and micro-benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from depthprune_runtime.engine.kv_cache import KVCache, kv_blocks_needed
from depthprune_runtime.engine.loading import in_panels
from depthprune_runtime.model.batch import PagedContext, packed
from depthprune_runtime.model.decoder import Decoder, WeightGetter
from depthprune_runtime.model.steps.cpu import DecodeStep
from depthprune_runtime.spec import DecoderSpec
from depthprune_runtime.weights.panels import PanelWeight, to_panels
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec
from depthprune_runtime.weights.rows import Stored

KV_BLOCK = 16


def quantized(weight: Tensor, quant: QuantSpec) -> QuantizedWeight:
    """Codes at random: only their size counts."""
    rows, columns = weight.shape
    groups = -(-columns // quant.group_size)
    codes = torch.randint(0, quant.levels, (rows, columns), dtype=torch.uint8)
    return QuantizedWeight.from_codes(quant, codes, torch.full((rows, groups), 2.0**-9))


def random_weights(
    spec: DecoderSpec, quant: QuantSpec | None = None, device: str | torch.device = "cpu"
) -> WeightGetter:
    """By name, made once; bf16, laid out as a runtime does, or, but for norms, quantised."""
    shapes = spec.tensor_shapes()
    packed = in_panels(spec, torch.bfloat16) if quant is None and torch.device(device).type == "cpu" else frozenset()

    @functools.cache
    def get(name: str) -> Stored:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
        weight = torch.randn(shapes[name], device=device).mul_(0.02).to(torch.bfloat16)
        if name in packed:
            return PanelWeight(to_panels(weight), *shapes[name])
        return weight if quant is None else quantized(weight, quant)

    return get


def decode_step(
    spec: DecoderSpec, weight: WeightGetter, batch: int = 1, context: int = 128, device: str = "cpu"
) -> Callable[[], Tensor]:
    """Logits of one new token of `batch` requests, each the last of `context`: in one C++ call where that is built."""
    place = torch.device(device)
    decoder = Decoder(spec, weight, place, torch.bfloat16)
    each = kv_blocks_needed(context, KV_BLOCK)
    cache = KVCache(spec, each * batch, KV_BLOCK, place, torch.bfloat16)
    for pair in cache.pairs:
        for tensor in pair or ():
            tensor.normal_()
    tables = torch.arange(each * batch, device=place).view(batch, each)
    slots = tables[:, (context - 1) // KV_BLOCK] * KV_BLOCK + (context - 1) % KV_BLOCK
    paged = PagedContext(slots, tables, torch.full((batch,), context, device=place), False)
    inputs = packed([1] * batch, place, [context - 1] * batch, paged)
    ids = torch.zeros(batch, dtype=torch.int64, device=place)
    native = None if DecodeStep.refuses(decoder) else DecodeStep(decoder, cache.pairs)

    def run() -> Tensor:
        with torch.inference_mode():
            if native is not None and batch <= native.max_tokens:
                return native.logits(ids, inputs)
            return decoder.logits(decoder.hidden_states(ids, inputs, cache.pairs))

    return run
