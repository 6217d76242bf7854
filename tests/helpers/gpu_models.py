"""Small Llama-shaped models with random weights for tests on a GPU."""

from __future__ import annotations

import pytest
import random_decoder
import torch

from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def _spec(*sublayers: AttentionSpec | FFNSpec, tied: bool = False) -> DecoderSpec:
    return DecoderSpec(256, 512, 512, 1e-5, RopeSpec(), tied, sublayers)


SPECS = {
    "dense": _spec(*[s for b in range(3) for s in (AttentionSpec(4, 2, 64, (b,)), FFNSpec(704, (b,)))]),
    # merged and narrowed blocks, a dropped attention, a window, norms and biases of Qwen
    "pruned": _spec(
        AttentionSpec(8, 4, 64, (0, 1)),
        FFNSpec(1408, (0, 1)),
        FFNSpec(640, (2,)),
        AttentionSpec(6, 3, 64, (3,), qk_norm=True, sliding_window=24),
        FFNSpec(704, (3,)),
        AttentionSpec(4, 2, 64, (4,), qkv_bias=True),
        tied=True,
    ),
}


def decoder(spec: DecoderSpec, device: torch.device, dtype: torch.dtype, weights: torch.dtype) -> Decoder:
    """The model whose tensors were rounded to `weights`, computing in `dtype`."""
    given = {name: t.to(weights) for name, t in random_decoder.tensors(spec, 0.08).items()}
    return Decoder(spec, given.__getitem__, device, dtype)
