"""How quality is recorded: single rows as bits, configurations once a commit, and nothing of an uncommitted tree."""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

import common
import pytest
import zero_shot

from depthprune_runtime.evaluation.results import Metric, TaskResult

LABELS = {"variant": "shortgpt", "blocks_fewer": 3, "repair": "ridge", "calibration": "books", "seed": 0, "tasks": "t"}


def result(task: str, **hits: tuple[int, ...]) -> TaskResult:
    n = len(next(iter(hits.values())))
    return TaskResult(task, "file", n, {name: Metric.mean(values) for name, values in hits.items()}, hits)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 500, 501])
def test_single_rows_survive_as_bits(n: int):
    draw = random.Random(n)
    hits = tuple(draw.randrange(2) for _ in range(n))
    assert zero_shot.from_bits(zero_shot.to_bits(hits), n) == hits


def test_the_first_row_is_the_highest_bit():
    assert zero_shot.to_bits((1, 0, 0, 0, 0, 1)) == "84"


def test_recorded_rows_give_back_the_results():
    results = [result("piqa", acc=(1, 0, 1), acc_norm=(0, 0, 1)), result("winogrande", acc=(0, 1, 1))]
    labels = {**LABELS, "commit": "abc"}
    rows = [{k: str(v) for k, v in row.items()} for row in zero_shot.single_rows(labels, results)]
    found = zero_shot.recorded(rows)
    assert list(found) == [("shortgpt", "3", "ridge", "books", "0", "t", "abc")]
    for ours, theirs in zip(found["shortgpt", "3", "ridge", "books", "0", "t", "abc"], results, strict=True):
        assert (ours.task, ours.n, ours.hits, ours.metrics) == (theirs.task, theirs.n, theirs.hits, theirs.metrics)
    assert zero_shot.from_json(json.loads(json.dumps(zero_shot.to_json(results)))) == results


def test_rows_beyond_the_reported_ones_have_another_name():
    names = ("piqa", "winogrande")
    assert zero_shot.label(names, 500, 0) == "piqa,winogrande"
    assert zero_shot.label(names, 500, 500) == "piqa,winogrande [500:1000]"
    assert zero_shot.label((), 500, 500) == ""


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


def stored(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_an_uncommitted_tree_are_not_published(results: Path, tmp_path: Path):
    common.append_rows("quality", [{"value": 1, "commit": "abc"}])
    common.append_rows("quality", [{"value": 2, "commit": "abc+"}])
    assert stored(results / "quality.csv") == [{"value": "1", "commit": "abc"}]
    assert common.recorded_rows("quality") == [{"value": "1", "commit": "abc"}]
    assert stored(results / "uncommitted" / "quality.csv") == [{"value": "2", "commit": "abc+"}]


def test_a_folder_that_was_asked_for_takes_all_rows(results: Path, tmp_path: Path):
    (tmp_path / "own").mkdir()
    common.append_rows("gpu", [{"value": 2, "commit": "abc+"}], tmp_path / "own")
    assert stored(tmp_path / "own" / "gpu.csv") == [{"value": "2", "commit": "abc+"}]


def test_columns_never_change(results: Path):
    common.append_rows("quality", [{"value": 1, "commit": "abc"}])
    with pytest.raises(SystemExit, match="start a new file"):
        common.append_rows("quality", [{"other": 1, "commit": "abc"}])


def test_a_configuration_is_measured_once_a_commit(results: Path, monkeypatch: pytest.MonkeyPatch):

    import bench_quality

    args = argparse.Namespace(tasks="piqa,winogrande", limit=500, offset=0, calibration="wikitext2")
    task = {"variant": "shortgpt", "blocks": 3, "repair": "none", "seed": 0}
    monkeypatch.setattr(bench_quality, "environment", lambda: {"commit": "abc"})
    assert not bench_quality.known(args, task)
    common.append_rows("quality", [{**bench_quality.labels_of(args, task), "commit": "abc"}])
    assert bench_quality.known(args, task)
    for other in ({"seed": 1}, {"repair": "ridge"}, {"blocks": 6}):
        assert not bench_quality.known(args, task | other)
    args.offset = 500
    assert not bench_quality.known(args, task)
    args.offset = 0
    monkeypatch.setattr(bench_quality, "environment", lambda: {"commit": "def"})
    assert not bench_quality.known(args, task)


def test_a_pruned_file_that_was_kept_is_not_pruned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import bench_quality

    calls = []
    plan = argparse.Namespace(parameters=7, sparsity=0.25)
    monkeypatch.setattr(bench_quality, "prune_variant", lambda task: calls.append(task) or plan)
    task = {"output": str(tmp_path / "pruned.safetensors")}
    first = bench_quality.pruned(task)
    assert (first["parameters"], first["sparsity"]) == (7, 0.25)
    assert bench_quality.pruned(task) == first
    assert len(calls) == 1
