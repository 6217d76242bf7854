"""Specs without weights."""

from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec


def plain_spec(blocks: int) -> DecoderSpec:
    sublayers = [s for b in range(blocks) for s in (AttentionSpec(4, 2, 8, (b,)), FFNSpec(48, (b,)))]
    return DecoderSpec(32, 64, 128, 1e-5, RopeSpec(), False, tuple(sublayers))
