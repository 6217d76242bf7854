"""What a model is, in plain data. Standard library only."""

from depthprune_runtime.spec.decoder import DecoderSpec
from depthprune_runtime.spec.rope import RopeKind, RopeSpec
from depthprune_runtime.spec.sublayers import Activation, AttentionSpec, FFNSpec, Shape, SublayerSpec

__all__ = [
    "Activation",
    "AttentionSpec",
    "DecoderSpec",
    "FFNSpec",
    "RopeKind",
    "RopeSpec",
    "Shape",
    "SublayerSpec",
]
