"""The emulated CUDA kernels, built once for all tests that run them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def set_order() -> Callable[[int], None]:
    """Loads the emulated kernels; chooses in which order the threads of a block run."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("g++ on Linux is not there: the CUDA kernels are not run on the CPU")
    import emulation

    order: Callable[[int], None] = emulation.load().set_order
    return order


@pytest.fixture(params=[0, 1, 7], ids=["forwards", "backwards", "shuffled"])
def any_order(request: pytest.FixtureRequest, set_order: Callable[[int], None]) -> Iterator[None]:
    """The threads of a block in this order; the same test passes in each, or a barrier is missing."""
    set_order(request.param)
    yield
    set_order(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
