"""The decode loop on the GPU: graphs, their launches, and the same tokens as step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_models import CUDA, SPECS, decoder, needs_gpu
from specs import mixed_spec

from depthprune_runtime.engine.decode_paths import DecodeBatch
from depthprune_runtime.engine.gpu_graphs import GpuGraphs
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.spec import AttentionSpec, DecoderSpec

pytestmark = needs_gpu


def built(spec: DecoderSpec, dtype: torch.dtype = torch.bfloat16) -> GpuGraphs:
    model = decoder(spec, CUDA, dtype, dtype)
    assert GpuGraphs.refuses(model) is None, "the kernels of the decode step are not all there"
    return GpuGraphs(model, KVCache(spec, 64, 16, CUDA, dtype))


def rows(count: int) -> DecodeBatch:
    return DecodeBatch(
        np.arange(3, 3 + count),
        np.zeros(count, dtype=np.int64),
        np.arange(4 * count).reshape(count, 4),
        [[]] * count,
        [0.0] * count,
    )


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("count", [1, 5])
@torch.inference_mode()
def test_a_graph_says_what_single_steps_say(name: str, count: int) -> None:
    loop, eager = built(SPECS[name]), built(SPECS[name])
    expected = loop.tokens(rows(count), 9)
    assert np.array_equal(loop.tokens(rows(count), 9), expected), "two runs differ"
    bucket = eager._load(rows(count))
    bucket._graph = None
    eager._load(rows(count))
    for _ in range(9):
        bucket.replay()
    assert np.array_equal(bucket.tokens[:9, :count].cpu().numpy(), expected)


@pytest.mark.parametrize("spec", [*SPECS.values(), mixed_spec()])
@torch.inference_mode()
def test_launches_of_the_captured_graph(spec: DecoderSpec) -> None:
    loop = built(spec)
    bucket = loop._load(rows(1))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bucket.replay()
        torch.cuda.synchronize()
    launches = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    attentions = [s for s in spec.sublayers if isinstance(s, AttentionSpec)]
    most = 3 * len(attentions) + sum(s.qk_norm for s in attentions) + 2 * (len(spec.sublayers) - len(attentions)) + 4
    assert len(spec.sublayers) <= len(launches) <= most, launches
