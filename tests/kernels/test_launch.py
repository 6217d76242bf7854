"""Launch configurations are pure functions of op, shape and capability."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthprune_runtime.kernels.launch import MAX_HIDDEN_SIZE, LaunchConfig, capability_of, launch_config

OPS = ["add_rms_norm", "rms_norm"]
CAPABILITIES = [(0, 0), (8, 0), (9, 0), (10, 0)]


@given(
    op=st.sampled_from(OPS),
    rows=st.integers(1, 1 << 20),
    hidden_size=st.integers(1, MAX_HIDDEN_SIZE),
    capability=st.sampled_from(CAPABILITIES),
)
def test_a_norm_tile_holds_whole_rows(op: str, rows: int, hidden_size: int, capability: tuple[int, int]) -> None:
    config = launch_config(op, (rows, hidden_size), capability)
    assert hidden_size <= config.block_size < 2 * hidden_size
    values_per_thread = config.block_rows * config.block_size / (32 * config.num_warps)
    assert values_per_thread <= 16
    assert config == launch_config(op, (1, hidden_size), capability), "results must not depend on the batch size"


def test_known_configurations() -> None:
    assert launch_config("rms_norm", (1, 576), (9, 0)) == LaunchConfig(1, 1024, 4)
    assert launch_config("rms_norm", (32, 128), (9, 0)) == LaunchConfig(4, 128, 2)
    assert launch_config("add_rms_norm", (1, 16384), (8, 0)) == LaunchConfig(1, 16384, 32)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"expected op in .*, got 'layer_norm'"):
        launch_config("layer_norm", (1, 576), (9, 0))
    with pytest.raises(ValueError, match=r"expected hidden_size in 1 \.\. 16384, got 16385"):
        launch_config("rms_norm", (1, MAX_HIDDEN_SIZE + 1), (9, 0))
    with pytest.raises(ValueError, match="expected block_size a power of two, got 576"):
        LaunchConfig(1, 576, 4)
    with pytest.raises(ValueError, match="at most 32 warps, got 64"):
        LaunchConfig(1, 1024, 64)


def test_the_cpu_has_no_capability() -> None:
    assert capability_of(torch.device("cpu")) == (0, 0)
