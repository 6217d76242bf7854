"""Launch configurations of the decode projections."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprune_runtime.kernels.launch_few_tokens import MAX_TOKENS, RowsConfig, next_tokens_block, rows_config

CAPABILITIES = [(0, 0), (8, 0), (9, 0), (10, 0)]


@given(
    tokens=st.integers(1, MAX_TOKENS),
    rows=st.integers(1, 130000),
    columns=st.integers(1, 30000),
    bits=st.sampled_from([32, 16, 8, 4]),
    capability=st.sampled_from(CAPABILITIES),
    paired=st.booleans(),
)
def test_a_tile_holds_all_tokens_and_fits_its_registers(
    tokens: int, rows: int, columns: int, bits: int, capability: tuple[int, int], paired: bool
) -> None:
    config = rows_config(tokens, rows, columns, bits, capability, paired)
    assert tokens <= config.block_t
    for value in (config.block_t, config.block_n, config.block_k, config.num_warps):
        assert value & (value - 1) == 0
    sums = config.block_n * (config.block_t if config.use_dot else config.block_k)
    assert sums / (32 * config.num_warps) <= 64, "float32 sums of a thread"
    assert config.block_k >= 16, "the depth of a matrix instruction"
    if bits <= 8 and paired:
        assert config.block_n == 32, "a panel from either place"
    same = rows_config(config.block_t if config.use_dot else 1, rows, columns, bits, capability, paired)
    assert config == same, "within a bucket of a graph the configuration, and with it every sum, is one"


def test_known_configurations() -> None:
    assert rows_config(1, 4096, 4096, 16, (9, 0)) == RowsConfig(1, 16, 512, False, 4, 3)
    assert rows_config(8, 4096, 4096, 16, (9, 0)) == RowsConfig(16, 16, 128, True, 4, 3)
    assert rows_config(1, 22016, 4096, 4, (9, 0), paired=True) == RowsConfig(1, 32, 32, False, 4, 3)
    assert next_tokens_block(8016) == (1024, 8)
    assert next_tokens_block(3) == (16, 1)


def test_errors() -> None:
    with pytest.raises(ValueError, match="rows: expected 1 to 64 tokens, got 65"):
        rows_config(65, 64, 64, 16, (9, 0))
