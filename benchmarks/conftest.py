"""Micro-benchmarks run in several takes, one after another over the whole suite: a shared machine changes its speed
from one ten seconds to the next, which the rounds of a single take do not see."""

from __future__ import annotations

import pytest

TAKES = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "take" in metafunc.fixturenames:
        metafunc.parametrize("take", range(TAKES), ids=[f"take{i}" for i in range(TAKES)])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.callspec.params["take"] if hasattr(item, "callspec") else 0)


@pytest.fixture(autouse=True)
def repeated(take: int) -> None:
    """Every benchmark has takes."""
