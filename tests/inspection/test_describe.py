"""The description of a model for people: its map, and the order in which FinerCut took it apart."""

from __future__ import annotations

import pytest
import torch

from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.fitting.calibration import CalibrationSet
from depthprune_runtime.inspection.describe import inspect, render
from depthprune_runtime.pruning.finercut.search import Goal, plan_finercut
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint


def lines_of(checkpoint):
    return render(inspect(checkpoint)).splitlines()


def map_of(lines):
    start = next(i for i, line in enumerate(lines) if line.startswith("by block"))
    return [line.split()[1] for line in lines[start + 1 : start + 3]]


def test_a_dense_model_is_whole_and_has_no_ranking(pico_file):
    lines = lines_of(open_checkpoint(pico_file))
    assert map_of(lines) == ["######", "######"]
    assert not [line for line in lines if "removed in this order" in line]


def test_the_map_shows_what_is_gone(pico_file):
    plan = PrunePlan("test", "", (Drop(2), Drop(9), Drop(11)))
    lines = lines_of(PrunedCheckpoint(open_checkpoint(pico_file), plan))
    assert map_of(lines) == ["#.####", "####.."]
    assert not [line for line in lines if "removed in this order" in line]


def test_the_ranking_of_finercut_is_listed_in_order(pico_file):
    checkpoint = open_checkpoint(pico_file)
    calibration = CalibrationSet(torch.arange(2, 34).view(2, 16), {"text": "count"})
    plan = plan_finercut(checkpoint, Goal(count=4), calibration, torch.device("cpu"), torch.float32, "angular")
    lines = lines_of(PrunedCheckpoint(checkpoint, plan))
    start = next(i for i, line in enumerate(lines) if "removed in this order" in line)
    assert "(angular)" in lines[start]
    for line, step in zip(lines[start + 2 :], plan.settings["ranking"], strict=False):
        number, kind, block, distance = line.split()
        assert (int(number), kind, int(block)) == (step["step"], step["kind"], step["block"])
        assert float(distance) == pytest.approx(step["distance"], rel=1e-5)
    assert lines[start + 6] == ""
