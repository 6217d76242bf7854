"""Shapes of public models, what pruning leaves of them, and the least that a step must read or compute. No torch."""

from __future__ import annotations

import dataclasses
import math

from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec


def llama(
    blocks: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, theta: float, positions: int
) -> DecoderSpec:
    attention = [AttentionSpec(heads, kv_heads, hidden // heads, (b,)) for b in range(blocks)]
    sublayers = [s for b in range(blocks) for s in (attention[b], FFNSpec(ffn, (b,)))]
    return DecoderSpec(hidden, vocabulary, positions, 1e-5, RopeSpec(theta=theta), False, tuple(sublayers))


def _qwen15_7b() -> DecoderSpec:
    spec = llama(32, 4096, 32, 32, 11008, 151936, 1000000.0, 32768)
    biased = [dataclasses.replace(s, qkv_bias=True) if isinstance(s, AttentionSpec) else s for s in spec.sublayers]
    return dataclasses.replace(spec, sublayers=tuple(biased))


def _smollm2() -> DecoderSpec:
    return dataclasses.replace(llama(30, 576, 9, 3, 1536, 49152, 100000.0, 8192), tie_word_embeddings=True)


SPECS = {
    "llama-2-7b": llama(32, 4096, 32, 32, 11008, 32000, 10000.0, 4096),
    "llama-2-13b": llama(40, 5120, 40, 40, 13824, 32000, 10000.0, 4096),
    "llama-2-70b": llama(80, 8192, 64, 8, 28672, 32000, 10000.0, 4096),
    "llama-3-8b": llama(32, 4096, 32, 8, 14336, 128256, 500000.0, 8192),
    "llama-3-70b": llama(80, 8192, 64, 8, 28672, 128256, 500000.0, 8192),
    "qwen1.5-7b": _qwen15_7b(),
    "smollm2-135m": _smollm2(),
}


def shortened(spec: DecoderSpec, blocks: int = 0, attentions: int = 0, ffns: int = 0) -> DecoderSpec:
    """`blocks` blocks fewer, and besides `attentions` and `ffns` of what is left, from the end.

    Which of equal sub-layers go changes no size; merged blocks that are narrowed back have this shape, too.
    """
    pairs = spec.whole_blocks() or ()
    kept = list(spec.sublayers[: pairs[-blocks][0] if blocks else None])
    for kind, number in (("attention", attentions), ("ffn", ffns)):
        gone = [i for i, s in enumerate(kept) if s.kind == kind][-number:] if number else []
        kept = [s for i, s in enumerate(kept) if i not in gone]
    return dataclasses.replace(spec, sublayers=tuple(kept))


def decode_bytes(spec: DecoderSpec, batch: int, context: float, element_size: int = 2) -> float:
    """Fewest bytes a decode step reads: every weight once, keys and values of `context` tokens of each request."""
    return spec.bytes_per_token(element_size) + batch * context * spec.kv_bytes_per_token(element_size)


def quantized_decode_bytes(spec: DecoderSpec, bits: int, group_size: int, batch: int, context: float) -> float:
    """The same with projections of `bits` and a 16-bit scale a group; the head and the cache stay in 16 bits."""
    shapes = spec.projections()
    head = math.prod(shapes.pop(spec.head_name))
    inner = sum(math.prod(s) for s in shapes.values())
    return inner * (bits / 8 + 2 / group_size) + 2 * head + batch * context * spec.kv_bytes_per_token(2)


def prefill_flops(spec: DecoderSpec, tokens: int) -> float:
    """Of one prompt: every projection, the head for its last token only, and causal attention."""
    shapes = spec.projections()
    head = math.prod(shapes.pop(spec.head_name))
    attention = sum(2 * s.q_size * tokens * (tokens + 1) for s in spec.attention_sublayers())
    return 2.0 * tokens * sum(math.prod(s) for s in shapes.values()) + 2.0 * head + attention
