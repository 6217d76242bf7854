"""Configurations of the tiled products are pure functions of shape, alignment and capability."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprune_runtime.kernels.launch_gemm import GemmConfig, gated_linear_config

SHARED = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}


@given(
    shape=st.tuples(st.integers(1, 1 << 18), st.integers(1, 1 << 15), st.integers(1, 1 << 17)),
    aligned=st.booleans(),
    capability=st.sampled_from(list(SHARED)),
)
def test_every_shape_fits(shape: tuple[int, int, int], aligned: bool, capability: tuple[int, int]) -> None:
    config = gated_linear_config(shape, aligned, capability)
    assert config.shared_bytes(2) <= SHARED[capability]
    accumulators = 2 * config.block_rows * config.block_columns / (32 * config.num_warps)
    assert accumulators <= 128, "registers a thread"


@given(capability=st.sampled_from(list(SHARED)), tokens=st.integers(1, 1 << 18))
def test_the_depth_does_not_follow_the_tokens(capability: tuple[int, int], tokens: int) -> None:
    configs = [gated_linear_config((t, 4096, 11008), True, capability) for t in (1, tokens)]
    assert configs[0].block_depth == configs[1].block_depth, "results must not depend on the batch size"


def test_known_configurations() -> None:
    assert gated_linear_config((2048, 4096, 11008), True, (9, 0)) == GemmConfig(128, 128, 64, 8, 8, 4)
    assert gated_linear_config((100, 4096, 11008), True, (9, 0)) == GemmConfig(128, 64, 64, 8, 4, 4)
    assert gated_linear_config((512, 576, 1536), True, (9, 0)) == GemmConfig(64, 64, 64, 8, 4, 4)
    assert gated_linear_config((2048, 4096, 11008), True, (8, 0)) == GemmConfig(128, 64, 32, 8, 4, 4)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"gated_linear: expected T, C and F >= 1, got \(0, 64, 64\)"):
        gated_linear_config((0, 64, 64), True, (9, 0))
    with pytest.raises(ValueError, match="expected block_depth a power of two >= 16, got 8"):
        GemmConfig(64, 64, 8, 8, 4, 3)
    with pytest.raises(ValueError, match=r"GemmConfig: expected 1 \.\. 16 warps"):
        GemmConfig(64, 64, 64, 8, 3, 3)
