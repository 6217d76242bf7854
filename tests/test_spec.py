"""Sizes against published models, JSON, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec


def llama2_7b(blocks: int = 32) -> DecoderSpec:
    sublayers = []
    for b in range(blocks):
        sublayers += [AttentionSpec(32, 32, 128, (b,)), FFNSpec(11008, (b,))]
    return DecoderSpec(4096, 32000, 4096, 1e-5, RopeSpec(), False, tuple(sublayers))


def test_llama2_7b_sizes():
    spec = llama2_7b()
    assert spec.num_parameters() == 6_738_415_616  # the published count
    assert spec.sublayer_parameters(0) == 4 * 4096**2 + 4096
    assert spec.sublayer_parameters(1) == 3 * 4096 * 11008 + 4096
    assert spec.bytes_per_token(2) == (6_738_415_616 - 32000 * 4096) * 2
    assert spec.kv_bytes_per_token(2) == 512 * 1024
    assert spec.uniform() == (32, AttentionSpec(32, 32, 128, (0,)), FFNSpec(11008, (0,)))


def test_the_papers_sparsity_of_25_blocks():
    sparsity = 1 - llama2_7b(25).num_parameters() / llama2_7b().num_parameters()
    assert round(100 * sparsity, 2) == 21.02  # ShortGPT and FlattenGPT print this for 32 -> 25 blocks


def test_a_tied_head_counts_once_but_is_read():
    spec = dataclasses.replace(llama2_7b(2), tie_word_embeddings=True)
    untied = llama2_7b(2)
    assert untied.num_parameters() - spec.num_parameters() == 32000 * 4096
    assert spec.bytes_per_token(2) == untied.bytes_per_token(2)
    assert "lm_head.weight" not in spec.tensor_shapes()


def test_dropped_and_mixed_sublayers():
    dense = llama2_7b(4)
    no_attention = dataclasses.replace(dense, sublayers=dense.sublayers[:2] + dense.sublayers[3:])
    assert no_attention.uniform() is None
    assert no_attention.whole_blocks() is None
    assert no_attention.kv_bytes_per_token(2) == 3 * 2 * 4096 * 2
    wide = dataclasses.replace(dense.sublayers[0], num_heads=64, num_kv_heads=64)
    mixed = dataclasses.replace(dense, sublayers=(wide, *dense.sublayers[1:]))
    assert mixed.uniform() is None
    narrow = dataclasses.replace(dense.sublayers[3], intermediate_size=5504)
    unequal = dataclasses.replace(dense, sublayers=(*dense.sublayers[:3], narrow, *dense.sublayers[4:]))
    assert unequal.uniform() is None
    assert unequal.whole_blocks() == dense.whole_blocks()
    assert mixed.whole_blocks() == dense.whole_blocks() == ((0, 1), (2, 3), (4, 5), (6, 7))
    for order in ((1, 0), (0, 0, 1, 1), (0,), (0, 1, 2), (1, 2, 3)):
        assert dataclasses.replace(dense, sublayers=tuple(dense.sublayers[i] for i in order)).whole_blocks() is None
    assert dataclasses.replace(dense, sublayers=()).uniform() is None


dims = st.integers(1, 5)
attention = st.builds(
    lambda k, g, d, o, b, n, w: AttentionSpec(k * g, k, 2 * d, tuple(o), b, not b, n, w),
    dims, dims, dims, st.lists(st.integers(0, 9), min_size=1, max_size=3), st.booleans(), st.booleans(),
    st.none() | st.integers(1, 99),
)  # fmt: skip
ffn = st.builds(
    lambda f, o, b: FFNSpec(f, tuple(o), down_bias=b),
    dims,
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.booleans(),
)
ropes = st.sampled_from([RopeSpec(), RopeSpec(kind="linear", factor=2.0), RopeSpec(kind="llama3", factor=8.0)])
specs = st.builds(
    DecoderSpec, dims, dims, dims, st.just(1e-5), ropes, st.booleans(), st.lists(attention | ffn, max_size=5).map(tuple)
)


@given(specs)
def test_json_round_trip(spec):
    assert DecoderSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(specs)
def test_parameters_are_the_sum_of_the_shapes(spec):
    by_sublayer = sum(spec.sublayer_parameters(i) for i in range(len(spec.sublayers)))
    assert spec.num_parameters(embeddings=False) == by_sublayer + spec.hidden_size


def test_fields_that_came_later_are_written_where_they_differ():
    """So that files of plain models are the same for every version."""
    data = llama2_7b(1).to_json()
    assert set(data) == {
        "hidden_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope", "tie_word_embeddings",
        "sublayers",
    }  # fmt: skip
    assert set(data["rope"]) == {
        "theta", "kind", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factors",
    }  # fmt: skip
    assert [set(s) for s in data["sublayers"]] == [
        {"kind", "num_heads", "num_kv_heads", "head_dim", "origin", "qkv_bias", "o_bias", "qk_norm", "sliding_window"},
        {"kind", "intermediate_size", "origin", "activation", "down_bias"},
    ]
    assert llama2_7b(1).beyond_llama() == frozenset()


def test_later_fields_come_back():
    local = RopeSpec(theta=1e6, rotary_dim=6, attention_factor=1.2)
    attention = AttentionSpec(
        4, 2, 8, (0,), qk_norm=True, qk_norm_over="all", post_norm=True, rope=local, scale=0.5, softcap=20.0
    )
    blind = AttentionSpec(4, 2, 8, (1,), use_rope=False)
    ffn = FFNSpec(40, (0,), activation="gelu_tanh", pre_norm=False, post_norm=True)
    spec = DecoderSpec(
        32, 64, 128, 1e-5, RopeSpec(), False, (attention, ffn, blind), embedding_scale=5.0, logit_softcap=30.0
    )
    assert DecoderSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.beyond_llama() == {
        "attention.qk_norm_over", "attention.post_norm", "attention.rope", "attention.scale", "attention.softcap",
        "attention.use_rope", "ffn.activation", "ffn.pre_norm", "ffn.post_norm", "rope.rotary_dim",
        "rope.attention_factor", "spec.embedding_scale", "spec.logit_softcap",
    }  # fmt: skip
    shapes = spec.tensor_shapes()
    assert "sublayers.1.norm.weight" not in shapes
    assert shapes["sublayers.1.post_norm.weight"] == (32,)


def corrupted(**changes):
    data = llama2_7b(1).to_json()
    for path, value in changes.items():
        target = data
        *parents, last = path.split("__")
        for p in parents:
            target = target[int(p) if p.isdigit() else p]
        if value is KeyError:
            del target[last]
        else:
            target[last] = value
    return data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, r"spec: unknown keys \['colour'\]"),
        ({"rope__colour": 1}, r"spec.rope: unknown keys \['colour'\]"),
        ({"sublayers__0__colour": 1}, r"spec.sublayers\[0\]: unknown keys \['colour'\]"),
        ({"hidden_size": KeyError}, r"spec: missing keys \['hidden_size'\]"),
        ({"sublayers__1__kind": "mamba"}, "got kind 'mamba'"),
        ({"sublayers__1__kind": ["ffn"]}, "got kind"),
        ({"sublayers": {}}, "expected a list"),
        ({"rope": None}, "spec.rope: expected a JSON object"),
        ({"hidden_size": "4096"}, "spec.hidden_size: expected an integer .*, got '4096'"),
        ({"hidden_size": -1}, "got -1"),
        ({"hidden_size": True}, "got True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"sublayers__0__num_heads": 31}, None),
        ({"sublayers__0__num_kv_heads": 5}, "multiple of num_kv_heads 5"),
        ({"sublayers__0__head_dim": 127}, "even"),
        ({"sublayers__0__origin": []}, "at least one block"),
        ({"sublayers__0__origin": 3}, "sublayers"),
        ({"sublayers__1__activation": "gelu"}, "silu"),
        ({"rope__kind": "yarn"}, "'yarn'"),
        ({"rope__factors": [1.0]}, "1 factors"),
        ({"rope__rotary_dim": 130}, "rotary_dim: expected at most head_dim 128, got 130"),
        ({"rope__rotary_dim": 7}, "even"),
        ({"rope__attention_factor": 0.0}, "attention_factor"),
        ({"sublayers__0__qk_norm_over": "heads"}, "qk_norm_over"),
        ({"sublayers__0__softcap": -1.0}, "softcap"),
        ({"sublayers__0__rope": {"kind": "yarn"}}, "rope"),
        ({"sublayers__1__pre_norm": False}, "pre_norm, post_norm or both"),
        ({"embedding_scale": 0}, "embedding_scale"),
    ],
)
def test_bad_json_is_refused_by_name(changes, message):
    if message is None:
        changes["sublayers__0__num_kv_heads"] = 31
        assert DecoderSpec.from_json(corrupted(**changes)).sublayers[0].num_heads == 31
        return
    with pytest.raises(InputError, match=message):
        DecoderSpec.from_json(corrupted(**changes))
