"""Blends of a pruned and a repaired model are what a repair of that strength writes."""

from __future__ import annotations

import argparse
import functools
import sys

import pytest
import torch
import tune

from depthprune_runtime import prune
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.fitting.options import RepairOptions


@pytest.mark.parametrize("method", ["finercut", "flattengpt"])
def test_blends_are_repairs_of_their_strength(pico_file, tmp_path, method, monkeypatch):
    """In one process from one repair, but for the rounding of its float32 weights."""
    small = functools.partial(prune, samples=8, seq_len=48)
    monkeypatch.setattr(tune, "prune", small)
    (tmp_path / "dense.safetensors").symlink_to(pico_file)
    args = argparse.Namespace(knob="strength", method=method, fast=False, calibration="builtin", seed=0)
    for value, blend in tune.models(args, tmp_path, 2, [0.0, 0.6, 1.0]):
        path = tmp_path / f"{value}"
        small(pico_file, path, method, blocks=2, repair=RepairOptions(strength=value))
        expected = open_checkpoint(path)
        assert blend.spec == expected.spec
        for name in expected.spec.tensor_shapes():
            torch.testing.assert_close(blend.tensor(name), expected.tensor(name), rtol=1e-6, atol=1e-6)


def test_tuning_rows_are_not_those_that_are_reported(monkeypatch):
    """500 is how many rows of each task the benchmarks report."""
    seen = []
    monkeypatch.setattr(tune, "import_model", lambda *_: None)
    monkeypatch.setattr(tune, "measure", lambda args, _: seen.append((args.offset, args.limit)))
    monkeypatch.setattr(sys, "argv", ["tune.py", "w", "strength", "--method", "shortgpt", "--values", "1"])
    tune.main()
    assert seen == [(500, 500)]
