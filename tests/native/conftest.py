"""Where the tests of csrc/cuda run: emulated on the CPU, built once, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from depthprune_runtime.ops import implementations

sys.path.insert(0, str(Path(__file__).parent))


# Only C++ has this op for CUDA.
HAS_GPU = torch.cuda.is_available() and implementations("rotary_kv_write")["CUDA"] == "native"


@pytest.fixture(scope="session")
def needs_gpu() -> None:
    if not HAS_GPU:
        pytest.skip("no CUDA device, or built without its kernels: the kernels of csrc/cuda are only emulated")


@pytest.fixture(scope="session")
def emulated() -> ctypes.CDLL:
    """The emulated kernels, and what controls the emulation."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("g++ on Linux is not there: the CUDA kernels are not run on the CPU")
    import emulation

    return emulation.load()


@pytest.fixture(params=["emulated", "gpu"] if HAS_GPU else ["emulated"])
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run that `emulation.call` calls."""
    import emulation

    if request.param == "emulated":
        request.getfixturevalue("emulated")
    emulation.TARGET.gpu = request.param == "gpu"
    yield request.param
    emulation.TARGET.gpu = False


@pytest.fixture(params=[0, 1, 7], ids=["forwards", "backwards", "shuffled"])
def any_order(request: pytest.FixtureRequest, target: str) -> Iterator[None]:
    """The threads of a block in this order; the same test passes in each, or a barrier is missing."""
    if target == "gpu":
        yield
        return
    library = request.getfixturevalue("emulated")
    library.set_order(request.param)
    yield
    library.set_order(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
