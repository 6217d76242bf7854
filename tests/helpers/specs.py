"""Specs without weights."""

from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec


def plain_spec(blocks: int) -> DecoderSpec:
    sublayers = [s for b in range(blocks) for s in (AttentionSpec(4, 2, 8, (b,)), FFNSpec(48, (b,)))]
    return DecoderSpec(32, 64, 128, 1e-5, RopeSpec(), False, tuple(sublayers))


def mixed_spec(window: int | None = None, kinds: str = "aFaafF") -> DecoderSpec:
    """One letter a sub-layer: `a` attention, alternately narrow and wide; `f` and `F` narrow and wide FFN."""
    sublayers: list[AttentionSpec | FFNSpec] = []
    for i, kind in enumerate(kinds):
        if kind == "a":
            groups = 1 + i % 3
            sublayers.append(AttentionSpec(2 * groups, groups, 8, (i,), sliding_window=window))
        else:
            sublayers.append(FFNSpec(40 if kind == "f" else 72, (i,)))
    return DecoderSpec(32, 64, 128, 1e-5, RopeSpec(), False, tuple(sublayers))
