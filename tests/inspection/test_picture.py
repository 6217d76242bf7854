"""The picture of a pruned model: what is drawn where, and what is refused."""

from __future__ import annotations

import sys

import pytest

from depthprune_runtime import InputError
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.inspection import picture as plotting
from depthprune_runtime.inspection.describe import inspect
from depthprune_runtime.inspection.picture import plot_map, removals
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint

RANKING = [
    {"step": 1, "sublayer": 8, "kind": "attention", "block": 4, "distance": 0.01},
    {"step": 2, "sublayer": 7, "kind": "ffn", "block": 3, "distance": 0.05},
]
FINERCUT = {"ranking": RANKING, "distance": "angular"}


def described(pico_file, settings):
    plan = PrunePlan("finercut", "", (Drop(7), Drop(8)), settings)
    return inspect(PrunedCheckpoint(open_checkpoint(pico_file), plan))


@pytest.fixture
def cells(monkeypatch):
    """(first block, blocks, row, text) of every rectangle drawn; row 1 is attention."""
    pytest.importorskip("matplotlib")
    drawn = []
    draw = plotting._cell

    def record(axes, first, length, height, colour, text, dark=False):
        drawn.append((first, length, height, text))
        draw(axes, first, length, height, colour, text, dark)

    monkeypatch.setattr(plotting, "_cell", record)
    return drawn


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_dropped_sublayers_carry_their_place_in_the_order(pico_file, tmp_path, cells, suffix, magic):
    path = tmp_path / f"map{suffix}"
    plot_map(described(pico_file, FINERCUT), path)
    assert path.read_bytes().startswith(magic)
    assert sorted(cells) == sorted(
        (block, 1, row, {(4, 1): "1", (3, 0): "2"}.get((block, row), "")) for block in range(6) for row in (0, 1)
    )


def test_a_plan_without_an_order_marks_what_is_gone(pico_file, tmp_path, cells):
    plot_map(described(pico_file, {}), tmp_path / "map.png")
    assert {c for c in cells if c[3]} == {(4, 1, 1, "x"), (3, 1, 0, "x")}


def test_merged_sublayers_span_their_blocks(pico_file, tmp_path, cells):
    description = inspect(open_checkpoint(pico_file))
    description["sublayers"] = [s for s in description["sublayers"] if s["origin"] != [2]]
    for sublayer in description["sublayers"][2:4]:
        sublayer["origin"] = [1, 2]
    plot_map(description, tmp_path / "map.png")
    assert {c for c in cells if c[3]} == {(1, 2, 1, "2"), (1, 2, 0, "2")}
    assert len(cells) == 10


def test_values_come_from_the_plan():
    known, label = removals({"settings": FINERCUT})
    assert known["ffn", 3] == plotting._Gone(2, 0.05)
    assert "angular" in label
    known, label = removals({"settings": {"removal_order": [5, 2]}})
    assert known["attention", 2] == known["ffn", 2] == plotting._Gone(2, 2.0)
    assert removals(None) == removals({"settings": {"ranking": []}}) == ({}, "")


def test_what_cannot_be_drawn_is_said(pico_file, tmp_path, monkeypatch):
    description = inspect(open_checkpoint(pico_file))
    with pytest.raises(InputError, match=r"ends in \.png or \.svg"):
        plot_map(description, tmp_path / "map.pdf")
    with pytest.raises(InputError, match="does not exist"):
        plot_map(description, tmp_path / "missing" / "map.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="need matplotlib"):
        plot_map(description, tmp_path / "map.png")
