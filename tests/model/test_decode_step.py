"""The decode step in one call: the same bits as the ops one by one."""

from __future__ import annotations

import dataclasses

import pytest
import specs
import torch
from built import built

from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.model.batch import PagedContext, packed
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.model.steps.cpu import DecodeStep
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec
from depthprune_runtime.weights.panels import PanelWeight, to_panels
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec
from depthprune_runtime.weights.weight import Format

_C = built()
CPU = torch.device("cpu")
BLOCK = 4
LEVELS = _C.cpu_levels()


def random_weights(spec: DecoderSpec, dtype: torch.dtype, quant: QuantSpec | None) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, object] = {}
    for name, shape in spec.tensor_shapes().items():
        if name.endswith("norm.weight"):
            weights[name] = torch.rand(shape, generator=generator).to(dtype) + 0.5
        elif quant is None or name.endswith("bias"):
            weights[name] = (torch.randn(shape, generator=generator) * 0.2).to(dtype)
        else:
            rows, columns = shape
            groups = -(-columns // quant.group_size)
            codes = torch.randint(0, quant.levels, shape, generator=generator)
            scales = torch.rand(rows, groups, generator=generator) * 0.5 / quant.levels
            zeros = None if quant.symmetric else torch.randint(0, quant.levels, (rows, groups), generator=generator)
            weights[name] = QuantizedWeight.from_codes(quant, codes, scales, zeros)
    return weights


def steps_agree(spec: DecoderSpec, dtype=torch.float32, quant=None, contexts=(1, 7, 30), steps=3, panels=False) -> None:
    """Decode `steps` tokens for requests of those contexts, whose kv_blocks are scattered, in both ways."""
    weights = random_weights(spec, dtype, quant)
    if panels:
        for name, shape in spec.projections().items():
            weights[name] = PanelWeight(to_panels(weights[name]), *shape)
    decoder = Decoder(spec, weights.__getitem__, CPU, dtype)
    width = -(-(max(contexts) + steps) // BLOCK)
    caches = [KVCache(spec, width * len(contexts), BLOCK, CPU, dtype) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    for pair, other in zip(caches[0].pairs, caches[1].pairs, strict=True):
        if pair is not None and other is not None:
            for ours, theirs in zip(pair, other, strict=True):
                ours.copy_(torch.randn(ours.shape, generator=generator))
                theirs.copy_(ours)
    tables = torch.randperm(width * len(contexts), generator=generator).view(len(contexts), width)
    step = DecodeStep(decoder, caches[0].pairs)
    for i in range(steps):
        ids = torch.randint(0, spec.vocab_size, (len(contexts),), generator=generator)
        starts = [c - 1 + i for c in contexts]
        slots = [int(tables[b, s // BLOCK]) * BLOCK + s % BLOCK for b, s in enumerate(starts)]
        lens = torch.tensor([s + 1 for s in starts])
        batch = packed([1] * len(contexts), CPU, starts, PagedContext(torch.tensor(slots), tables, lens, False))
        with torch.inference_mode():
            expected = decoder.logits(decoder.hidden_states(ids, batch, caches[1].pairs))
            found = step.logits(ids, batch)
        assert expected.isfinite().all() and expected.std() > 0
        assert torch.equal(found, expected)
        for pair, other in zip(caches[0].pairs, caches[1].pairs, strict=True):
            assert pair is None or (torch.equal(pair[0], other[0]) and torch.equal(pair[1], other[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2, 3, 9])
def test_equals_the_ops(dtype, batch):
    steps_agree(specs.mixed_spec(), dtype, contexts=[1 + 11 * i for i in range(batch)])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_ops_at_every_level(level, batch):
    before = _C.cpu_level()
    _C.set_cpu_level(level)
    try:
        for quant in (None, QuantSpec(4, 32)):
            steps_agree(specs.mixed_spec(), torch.bfloat16, quant, [20] * batch)
    finally:
        _C.set_cpu_level(before)


@pytest.mark.parametrize(
    ("level", "batch"),
    [(level, batch) for level in LEVELS for batch in (1, 3, 17) if (level, batch) != ("generic", 17)],
)
def test_equals_the_ops_with_weights_in_panels(level, batch):
    tied = dataclasses.replace(specs.mixed_spec(), tie_word_embeddings=True)
    _C.set_cpu_level(level)
    try:
        for spec in (specs.mixed_spec(), tied):
            steps_agree(spec, torch.bfloat16, contexts=[20] * batch, panels=True)
    finally:
        _C.set_cpu_level(LEVELS[-1])


@pytest.mark.parametrize(
    "quant", [QuantSpec(8, 32), QuantSpec(8, 64, False), QuantSpec(4, 32), QuantSpec(4, 128, False)], ids=str
)
def test_equals_the_ops_with_quantised_weights(quant):
    tied = dataclasses.replace(specs.mixed_spec(), tie_word_embeddings=True)
    for spec in (specs.mixed_spec(), tied):
        steps_agree(spec, torch.bfloat16, quant, [5])
        steps_agree(spec, torch.float32, quant, [5, 9, 1, 40])


@pytest.mark.parametrize("kinds", ["aaa", "fF", "", "faFa"])
def test_any_order_of_sublayers(kinds):
    steps_agree(specs.mixed_spec(kinds=kinds))


def test_windows_and_contexts_whose_keys_are_split():
    steps_agree(specs.mixed_spec(window=6))
    long = dataclasses.replace(specs.mixed_spec(), max_position_embeddings=1024)
    steps_agree(long, torch.bfloat16, contexts=[700, 3, 257])
    steps_agree(long, torch.bfloat16, contexts=[600])


def test_biases_norms_of_heads_and_head_sizes():
    sublayers = (
        AttentionSpec(6, 3, 12, (0,), qkv_bias=True, o_bias=True, qk_norm=True),
        FFNSpec(50, (0,), down_bias=True),  # no multiple of the kernels' rows
        AttentionSpec(2, 1, 20, (1,), qk_norm=True),
        FFNSpec(33, (1,)),
    )
    spec = dataclasses.replace(specs.plain_spec(1), hidden_size=44, sublayers=sublayers)
    for dtype in (torch.float32, torch.bfloat16):
        steps_agree(spec, dtype)
        steps_agree(spec, dtype, QuantSpec(8, 32))


def test_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            steps_agree(specs.mixed_spec(), torch.bfloat16, contexts=[30])
            steps_agree(specs.mixed_spec(), torch.bfloat16, contexts=[30, 3])
    finally:
        torch.set_num_threads(before)


def test_bad_places_are_refused():
    spec = specs.plain_spec(1)
    decoder = Decoder(spec, random_weights(spec, torch.float32, None).__getitem__, CPU, torch.float32)
    step = DecodeStep(decoder, KVCache(spec, 4, BLOCK, CPU, torch.float32).pairs)

    def run(token=1, slot=0, block=0, length=1):
        paged = PagedContext(torch.tensor([slot]), torch.tensor([[block]]), torch.tensor([length]), False)
        step.logits(torch.tensor([token]), packed([1], CPU, [0], paged))

    run()
    for what, bad in {"ids": {"token": 64}, "slots": {"slot": 16}, "block_tables": {"block": 4}}.items():
        with pytest.raises(ValueError, match=f"decode_step: expected {what}"):
            run(**bad)
    with pytest.raises(ValueError, match="context_lens"):
        run(length=5)


def arguments(rows: int, columns: int, **changes: object) -> dict[str, object]:
    dense = {"weight": [torch.ones(rows, columns)], "bias": None, "out_features": rows, "in_features": columns}
    return dense | {"format": int(Format.ROWS), "bits": 0, "group_size": 0} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": 2, "bits": 4, "group_size": 0, "weight": [torch.ones(1), torch.ones(1)]},
            "group_size of 32, 64 or 128, got 0",
        ),
        ({"format": 3}, r"format of 0 \(rows\), 1 \(panels\) or 2 \(codes\), got 3"),
        ({"format": -1}, "format of 0"),
        ({"format": 2, "bits": 5}, "bits of 4 or 8, got 5"),
        ({"weight": []}, "weight of one tensor, got 0 tensors"),
        ({"format": 2, "bits": 8, "group_size": 32}, "two tensors, or three with zero points, got 1 tensors"),
        ({"out_features": 0}, "out_features of 1 to"),
        ({"in_features": -1}, "in_features of 1 to"),
    ],
)
def test_a_projection_of_an_unknown_layout_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"decode_step: expected .*{message}"):
        _C.StepLinear(**arguments(8, 8, **changes))


def test_a_head_of_more_rows_than_the_embedding_is_refused():
    """Else a token that a greedy step chooses has no row to be looked up in the next."""
    builder = _C.StepBuilder(torch.float32, 8, 1e-5)
    embedding, head = _C.StepLinear(**arguments(20, 8)), _C.StepLinear(**arguments(21, 8))
    with pytest.raises(ValueError, match=r"expected lm_head of at most 20 rows .*, got 21"):
        builder.set_ends(embedding, torch.ones(8), head)
    with pytest.raises(ValueError, match="expected builder of both ends"):
        _C.DecodeStep(builder)
    builder.set_ends(embedding, torch.ones(8), embedding)
    assert _C.DecodeStep(builder).max_tokens() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads of 1 to"),
        ({"num_kv_heads": 0}, "num_kv_heads of 1 to"),
        ({"head_dim": 0}, "head_dim of 1 to"),
        ({"k_norm": None}, "q_norm and k_norm of both or neither, got q_norm alone"),
        ({"q_norm": None}, "both or neither, got k_norm alone"),
        ({"window": -1}, "window of at least 0"),
        ({"k_cache": torch.zeros(3)}, "k_cache of shape"),
        ({"k_cache": torch.zeros(2, 0, 1, 4)}, "k_cache of shape"),
    ],
)
def test_attention_of_no_heads_and_half_a_norm_is_refused(changes, message):
    builder = _C.StepBuilder(torch.float32, 8, 1e-5)
    good = {
        "norm": torch.ones(8), "qkv": _C.StepLinear(**arguments(16, 8)), "o": _C.StepLinear(**arguments(8, 8)),
        "q_norm": torch.ones(2, 4), "k_norm": torch.ones(1, 4), "num_heads": 2, "num_kv_heads": 1, "head_dim": 4,
        "scale": 0.5, "window": 0, "rotary": 0, "k_cache": torch.zeros(2, 3, 1, 4), "v_cache": torch.zeros(2, 3, 1, 4),
    }  # fmt: skip
    builder.add_attention(**good)
    with pytest.raises(ValueError, match=message):
        builder.add_attention(**good | changes)
