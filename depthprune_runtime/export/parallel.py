"""How a model can be spread over devices: tensor-parallel sizes, and layers of equal bytes for a pipeline."""

from __future__ import annotations

import itertools
import math

from depthprune_runtime.checkpoint.anchored_layout import anchored_layers
from depthprune_runtime.spec import DecoderSpec

_STAGES = (2, 4, 8)


def tensor_parallel_sizes(spec: DecoderSpec) -> list[int]:
    """Sizes that every layer's heads, KV heads and widths allow; KV heads divide, or are divided and repeated."""
    attentions = spec.attention_sublayers()
    most = math.gcd(
        *(attention.num_heads for attention in attentions), *(f.intermediate_size for f in spec.ffn_sublayers())
    )
    return [
        size
        for size in range(1, most + 1)
        if most % size == 0 and all(a.num_kv_heads % size == 0 or size % a.num_kv_heads == 0 for a in attentions)
    ]


def layer_bytes(spec: DecoderSpec, element_size: int = 2) -> list[int]:
    """Bytes of each layer of the anchored folder, with the embedding on the first and the head on the last."""
    layers = anchored_layers(spec)
    found = [sum(map(spec.sublayer_parameters, layer.sublayers)) for layer in layers]
    table = spec.vocab_size * spec.hidden_size
    found[0] += table
    found[-1] += table
    return [count * element_size for count in found]


def balanced(sizes: list[int], stages: int) -> list[int]:
    """How many of `sizes`, in order, each of `stages` takes: the largest stage as small as it can be, the rest even."""
    ends = [0, *itertools.accumulate(sizes)]
    count = len(sizes)
    # first sizes -> largest stage, sum of squares, counts, of the best split of them over the stages so far
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage in range(1, stages + 1):
        grown = {}
        for end in range(stage, count - (stages - stage) + 1):
            choices = []
            for start, (largest, squares, counts) in best.items():
                if start < end:
                    size = ends[end] - ends[start]
                    choices.append((max(largest, size), squares + size**2, (*counts, end - start)))
            grown[end] = min(choices)
        best = grown
    return list(best[count][2])


def pipeline_partitions(spec: DecoderSpec) -> dict[int, list[int]]:
    """Stages -> layers of each, the value of `VLLM_PP_LAYER_PARTITION`."""
    sizes = layer_bytes(spec)
    return {stages: balanced(sizes, stages) for stages in _STAGES if stages <= len(sizes)}
