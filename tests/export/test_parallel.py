"""Spreading a model over devices."""

from __future__ import annotations

import itertools

from specs import mixed_spec, plain_spec

from depthprune_runtime.export.parallel import balanced, pipeline_partitions, tensor_parallel_sizes
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec


def spec(heads: int, kv_heads: int, width: int) -> DecoderSpec:
    return DecoderSpec(
        64, 64, 64, 1e-5, RopeSpec(), False, (AttentionSpec(heads, kv_heads, 8, (0,)), FFNSpec(width, (0,)))
    )


def test_tensor_parallel_sizes():
    assert tensor_parallel_sizes(spec(9, 3, 1536)) == [1, 3]  # 9 needs a width that it divides
    assert tensor_parallel_sizes(spec(9, 3, 1152)) == [1, 3, 9]
    assert tensor_parallel_sizes(spec(8, 2, 256)) == [1, 2, 4, 8]  # KV heads are repeated beyond 2
    assert tensor_parallel_sizes(spec(32, 8, 100)) == [1, 2, 4]
    assert tensor_parallel_sizes(mixed_spec()) == [1]  # 1 and 3 KV heads


def test_stages_are_as_even_as_they_can_be():
    sizes = [9, 1, 1, 1, 5, 1, 7]
    for stages in range(1, len(sizes) + 1):
        found = balanced(sizes, stages)
        assert sum(found) == len(sizes) and len(found) == stages and min(found) >= 1
        cuts = itertools.combinations(range(1, len(sizes)), stages - 1)
        best = min(max(sum(sizes[a:b]) for a, b in itertools.pairwise([0, *inner, len(sizes)])) for inner in cuts)
        ends = [0, *itertools.accumulate(found)]
        assert max(sum(sizes[a:b]) for a, b in itertools.pairwise(ends)) == best


def test_the_rest_is_even_where_one_layer_is_the_largest_stage():
    assert balanced([10, 1, 1, 1, 1], 3) == [1, 2, 2]
    assert balanced([10, 1, 1, 1, 1, 1, 1, 10], 4) == [1, 3, 3, 1]


def test_partitions_count_layers():
    assert pipeline_partitions(plain_spec(4)).keys() == {2, 4}
    assert pipeline_partitions(plain_spec(4))[4] == [1, 1, 1, 1]
    assert sum(pipeline_partitions(plain_spec(9))[2]) == 9
