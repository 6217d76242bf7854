"""The C++ extension for the tests of it. conftest.py ends a run without it, unless it was left out on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from depthprune_runtime.host.extension import SWITCH, extension


def built() -> Any:
    """The module `_C`; where it was left out, the test module that asks is skipped."""
    module = extension()
    if module is None:
        pytest.skip(f"{SWITCH}=1: there is no extension to test", allow_module_level=True)
    return module
