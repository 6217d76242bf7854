"""Models that several tests of pruning share."""

from __future__ import annotations

import pico
import pytest
from other_models import build

from depthprune_runtime.pruning.recurrent.blocks import OTHER_FAMILIES


@pytest.fixture(scope="session")
def parents(tmp_path_factory):
    """family -> folder; build or load a model anew where it is run, for RWKV rescales its weights then."""
    return {f: pico.save(build(f), tmp_path_factory.mktemp(f)) for f in OTHER_FAMILIES}
