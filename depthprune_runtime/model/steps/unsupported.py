"""What the steps of one kind of device do not compute; the decoder's methods do."""

from __future__ import annotations

from depthprune_runtime.spec import DecoderSpec

# told by rotary tables and by the scale, which the steps take for every attention
_HANDLED = {"rope.rotary_dim", "rope.attention_factor", "attention.use_rope", "attention.rope", "attention.scale"}


def unsupported(spec: DecoderSpec) -> str | None:
    """Names of what a step lacks for `spec`; None where it lacks nothing."""
    rest = spec.beyond_llama() - _HANDLED
    return ", ".join(sorted(rest)) if rest else None
