"""Decoders with random weights, without files, and what they say to one request without paging or batching."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from depthprune_runtime.engine.adjustments import Adjustment, Words, seen_tokens, token_bias
from depthprune_runtime.engine.engine import Engine
from depthprune_runtime.engine.inputs import Inputs
from depthprune_runtime.engine.options import EngineOptions
from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.sampler import RequestSampler, sample_batch
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.spec import DecoderSpec

CPU = torch.device("cpu")


@functools.cache
@torch.inference_mode(False)  # kept for tests that train, too, whoever asks first
def tensors(spec: DecoderSpec, scale: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) + 0.5
        if name.endswith("norm.weight")
        else torch.randn(shape, generator=generator) * scale
        for name, shape in spec.tensor_shapes().items()
    }


@functools.cache
def decoder(spec: DecoderSpec) -> Decoder:
    return Decoder(spec, tensors(spec).__getitem__, CPU, torch.float32)


def engine(spec: DecoderSpec, kv_blocks: int | None = None, kv_block_size: int = 4, **options: object) -> Engine:
    """An engine with room for exactly `kv_blocks`."""
    if kv_blocks is not None:
        options["kv_memory"] = kv_blocks * kv_block_size * spec.kv_bytes_per_token(4)
    chosen = EngineOptions(kv_block_size=kv_block_size, **options)
    return Engine(decoder(spec), Inputs("random", spec, None, {}), chosen)


def sampler_of(
    params: SamplingParams,
    prompt: Sequence[int],
    stream: int,
    vocab_size: int,
    end_ids: Sequence[int] = (),
    bad_words: Words = (),
) -> RequestSampler:
    adjustment = None
    if params.adjusts:
        seen, bias = seen_tokens(prompt, vocab_size, CPU), token_bias(params, vocab_size, CPU)
        adjustment = Adjustment(params, seen, bias, vocab_size, CPU, end_ids, bad_words)
    return RequestSampler(params, adjustment, stream, vocab_size)


@functools.cache
def solo(spec: DecoderSpec, prompt: tuple[int, ...], params: SamplingParams, output_index: int = 0) -> tuple[int, ...]:
    """Tokens of one output: every step runs the whole text again."""
    model = decoder(spec)
    sampler = sampler_of(params, prompt, output_index, spec.vocab_size)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(min(params.max_tokens, spec.max_position_embeddings - len(prompt))):
            hidden = model.hidden_states(torch.tensor(ids), packed([len(ids)], CPU))
            ids += sample_batch(model.logits(hidden[-1:]), [sampler])
    return tuple(ids[len(prompt) :])
