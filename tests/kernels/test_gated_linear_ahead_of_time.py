"""The Triton gated projection compiles for each supported architecture, without a GPU: no value leaves the registers,
and the matrix instructions of the architecture do the work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: ahead-of-time compilation is not checked")

from ahead_of_time import Launch, check, cuobjdump, record

from depthprune_runtime.kernels import gated_linear
from depthprune_runtime.ops._triton import implementation

MATRIX_INSTRUCTION = {80: "HMMA.16816.F32", 90: "HGMMA.64x", 100: "UTCHMMA"}
BF16, FP16 = torch.bfloat16, torch.float16
# T, C, F: Llama-2-7B, two of its FFNs concatenated, Llama-3-8B; SmolLM2-135M
MODELS = [(4096, 11008), (4096, 22016), (4096, 14336), (576, 1536)]


def launch_of(shape: tuple[int, int, int], dtype: torch.dtype, capability: int, bias: bool = False) -> Launch:
    tokens, hidden_size, channels = shape
    x = torch.empty(tokens, hidden_size, dtype=dtype, device="meta")
    weight = torch.empty(2 * channels, hidden_size, dtype=dtype, device="meta")
    given = torch.empty(2 * channels, dtype=dtype, device="meta") if bias else None
    (launch,) = record(lambda: gated_linear.gated_linear(x, weight, given), capability)
    return launch


def assert_compiles(launch: Launch, capability: int, folder: Path) -> None:
    aligned = launch.arguments["HIDDEN_SIZE"] % 16 == 0
    compiled = check(launch, capability, folder, vector_loads=aligned)
    code = cuobjdump(compiled, folder, "-sass")
    assert MATRIX_INSTRUCTION[capability] in code
    assert ("LDGSTS" in code) == aligned, "copies into shared memory run ahead of the products"


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for the module: shapes that differ in no specialisation are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("shape", "dtype", "bias"),
    [
        *[((tokens, *model), BF16, False) for tokens in (2048, 512) for model in MODELS],
        ((2048, 4096, 11008), FP16, True),
        ((100, 4096, 11008), BF16, False),
        ((300, 577, 1530), BF16, False),  # no divisibility: element by element, but in registers
    ],
    ids=str,
)
def test_no_spills_and_tensor_cores(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, capability: int, tmp_path: Path
) -> None:
    assert_compiles(launch_of(shape, dtype, capability, bias), capability, tmp_path)


def test_no_spills_on_the_newest(tmp_path: Path) -> None:
    assert_compiles(launch_of((2048, 4096, 11008), BF16, 100), 100, tmp_path)


def test_the_grid_covers_the_output_once() -> None:
    launch = launch_of((130, 64, 200), BF16, 90)
    rows, columns = launch.arguments["BLOCK_ROWS"], launch.arguments["BLOCK_COLUMNS"]
    assert launch.grid == (math.ceil(130 / rows) * math.ceil(200 / columns),)


def test_few_tokens_launch_nothing() -> None:
    x, weight = torch.empty(64, 64, dtype=BF16, device="meta"), torch.empty(128, 64, dtype=BF16, device="meta")
    assert record(lambda: implementation("gated_linear")(x, weight, None), 90) == []
