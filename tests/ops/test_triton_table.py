"""The table of Triton launchers names what is there."""

from __future__ import annotations

import importlib
import inspect

import pytest

pytest.importorskip("triton", reason="triton is not installed: the launchers cannot be imported")

from depthprune_runtime.ops._library import REFERENCES
from depthprune_runtime.ops._triton import LAUNCHERS


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_takes_what_the_reference_takes(name):
    launcher = getattr(importlib.import_module(f"depthprune_runtime.kernels.{LAUNCHERS[name]}"), name)
    assert list(inspect.signature(launcher).parameters) == list(inspect.signature(REFERENCES[name]).parameters)
