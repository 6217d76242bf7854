"""Pruned models of every shape, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pruned_pico
import pytest


@pytest.fixture(scope="session")
def pruned(tmp_path_factory) -> Callable[[str], Path]:
    """The file of a shape of `pruned_pico.SHAPES`."""
    folder = tmp_path_factory.mktemp("pruned")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = pruned_pico.write(name, folder)
        return made[name]

    return get
