"""Launch configurations of attention are pure functions of static bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthprune_runtime.kernels.launch import sm_count_of
from depthprune_runtime.kernels.launch_attention import (
    MAX_HEAD_DIM,
    MAX_TICKETS,
    AttentionConfig,
    decode_config,
    prefill_config,
)

CAPABILITIES = [(0, 0), (8, 0), (8, 9), (9, 0), (10, 0)]
heads = st.tuples(st.integers(1, 128), st.integers(1, 80))  # KV heads, heads of a group
head_dims = st.integers(1, MAX_HEAD_DIM)
element_sizes = st.sampled_from([2, 4])
capabilities = st.sampled_from(CAPABILITIES)


@given(heads, head_dims, element_sizes, st.booleans(), capabilities)
def test_a_prefill_tile_holds_whole_tokens(
    heads: tuple[int, int], head_dim: int, element_size: int, paged: bool, capability: tuple[int, int]
) -> None:
    kv_heads, group = heads
    config = prefill_config(kv_heads * group, kv_heads, head_dim, element_size, paged, capability)
    assert config.block_m >= max(16, group)
    assert config.block_n >= 16
    assert config.splits == 1
    assert config == prefill_config(group, 1, head_dim, element_size, paged, capability), "merged heads tile alike"


@given(
    st.integers(1, 1024), heads, head_dims, element_sizes, st.integers(1, 1 << 20), capabilities, st.integers(0, 200)
)
def test_decode_fills_the_device_within_the_workspace(
    batch: int,
    heads: tuple[int, int],
    head_dim: int,
    element_size: int,
    max_context: int,
    capability: tuple[int, int],
    sm_count: int,
) -> None:
    kv_heads, group = heads
    shape = (batch, kv_heads * group, kv_heads, head_dim, max_context, element_size)
    config = decode_config(*shape, capability, sm_count)
    sms = sm_count or {0: 4, 8: 108, 9: 132, 10: 148}[capability[0]]
    pairs, tiles = batch * kv_heads, -(-max_context // config.block_n)
    assert config.block_m == 1 if group == 1 else config.block_m >= max(16, group)
    assert config.splits <= tiles
    if pairs < 2 * sms:
        assert pairs * config.splits >= min(2 * sms, pairs * tiles), "an SM is idle that a tile could use"
        assert pairs * config.splits < 2 * sms + pairs
    if config.splits > 1:
        assert pairs < MAX_TICKETS
        assert pairs * config.splits <= 16 * sms, "the partial results outgrow the device"


def test_known_configurations() -> None:
    assert prefill_config(32, 32, 128, 2, False, (9, 0)) == AttentionConfig(128, 64, 8, 3)
    assert prefill_config(64, 64, 128, 2, True, (9, 0)) == AttentionConfig(128, 64, 8, 5)
    assert decode_config(1, 32, 32, 128, 4096, 2, (9, 0)) == AttentionConfig(1, 32, 4, 4, splits=9)
    assert decode_config(1, 64, 64, 128, 4096, 2, (9, 0)).splits == 5
    assert decode_config(1, 32, 8, 128, 4096, 2, (8, 0)) == AttentionConfig(16, 32, 4, 7, splits=27)
    assert decode_config(1, 32, 8, 128, 64, 2, (8, 0)).splits == 2, "no more splits than tiles"
    assert decode_config(64, 32, 8, 128, 4096, 2, (9, 0)).splits == 1
    assert decode_config(64, 32, 8, 128, 1 << 17, 2, (9, 0)).splits == 4, "long contexts split on a full device too"


def test_the_sm_count_is_an_argument() -> None:
    assert decode_config(1, 8, 8, 128, 1 << 16, 2, (9, 0), sm_count=16).splits == 4
    assert sm_count_of(torch.device("cpu")) == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected num_heads a multiple of num_kv_heads, got 9, 2"):
        prefill_config(9, 2, 64, 2, False, (9, 0))
    with pytest.raises(ValueError, match=r"expected head_dim in 1 \.\. 256, got 257"):
        decode_config(1, 9, 3, 257, 64, 2, (9, 0))
    with pytest.raises(ValueError, match="expected batch and max_context >= 1, got 1 and 0"):
        decode_config(1, 9, 3, 64, 0, 2, (9, 0))
    with pytest.raises(ValueError, match="expected block_n a power of two, got 48"):
        AttentionConfig(16, 48, 4, 1)
    with pytest.raises(ValueError, match="expected splits >= 1, got 0"):
        AttentionConfig(16, 64, 4, 1, splits=0)
