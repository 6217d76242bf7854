"""Tables of quality from rows made here: whose rows count, paired differences, ties, and what was not measured."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import statistics
from pathlib import Path

import pytest
import zero_shot
from report import measured, quality_tables, tables
from report import rows as recorded

from depthprune_runtime.evaluation.results import Metric, TaskResult

PLACE = {"date": "2027-01-01", "commit": "abc"}
COST = {"parameters": 1_000_000, "perplexity": 20.0, "prune_s": 1.0, "peak_mb": 2}


def results(seed: int, like: list[TaskResult] | None = None, agree: float = 0.9) -> list[TaskResult]:
    """Random rows of all tasks; with `like`, most of its rows."""
    draw = random.Random(seed)
    found = []
    for place, task in enumerate(zero_shot.TASKS):
        names = ("acc",) if task in ("winogrande", "lambada_openai") else ("acc", "acc_norm")
        hits = {}
        for name in names:
            old = [draw.randrange(2) for _ in range(200)] if like is None else like[place].hits[name]
            hits[name] = tuple(hit if like is None or draw.random() < agree else 1 - hit for hit in old)
        metrics = {name: Metric.mean(values) for name, values in hits.items()}
        if task == "lambada_openai":
            metrics["perplexity"] = Metric(30.0, 1.0)
        found.append(TaskResult(task, "file", 200, metrics, hits))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recorded, "RESULTS", tmp_path)
    return tmp_path


def append(path: Path, rows: list[dict[str, object]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def record(
    folder: Path, variant: str, blocks: int, repair: str, found: list[TaskResult] | None, **other: object
) -> None:
    labels = {"variant": variant, "blocks_fewer": blocks, "repair": repair, "calibration": "wikitext2", "seed": 0}
    labels |= {"tasks": zero_shot.REPORTED if found else ""}
    labels |= {name: value for name, value in other.items() if name in labels}
    place = PLACE | {name: str(value) for name, value in other.items() if name in PLACE}
    cost = COST | {name: value for name, value in other.items() if name in COST}
    accuracy = json.dumps(zero_shot.scores(found)) if found else ""
    append(folder / "quality.csv", [{**labels, **cost, "accuracy": accuracy, **place}])
    if found:
        rows = zero_shot.single_rows({**labels, "commit": place["commit"]}, found)
        append(folder / "quality_rows.csv", rows)


def by_hand(ours: list[TaskResult], theirs: list[TaskResult]) -> tuple[float, float]:
    """Difference of the papers' means in points and its paired standard error."""
    values, variances = [], []
    for a, b in zip(ours[:5], theirs[:5], strict=True):
        name = "acc" if a.task == "winogrande" else "acc_norm"
        gaps = [x - y for x, y in zip(a.hits[name], b.hits[name], strict=True)]
        values.append(statistics.mean(gaps))
        variances.append(statistics.variance(gaps) / 200)
    return 100 * statistics.mean(values), 100 * math.sqrt(sum(variances)) / 5


def test_differences_are_paired(folder: Path):
    dense = results(1)
    printed, repaired = results(2, dense), results(3, dense)
    record(folder, "dense", 0, "none", dense)
    record(folder, "shortgpt", 3, "none", printed)
    record(folder, "shortgpt", 3, "ridge", repaired)
    rows = {(r["variant"], r["repair"]): r for r in quality_tables.quality_rows()}
    assert rows["shortgpt", "none"]["to_dense"] == pytest.approx(by_hand(printed, dense))
    assert rows["shortgpt", "ridge"]["to_dense"] == pytest.approx(by_hand(repaired, dense))
    assert rows["shortgpt", "ridge"]["by_repair"] == pytest.approx(by_hand(repaired, printed))
    assert rows["dense", "none"]["to_dense"] is None
    # pairing is the point: either mean alone has more noise than their difference
    assert rows["shortgpt", "none"]["to_dense"][1] < rows["shortgpt", "none"]["zero_shot"][1]
    assert rows["dense", "none"]["lambada"] == {"acc": round(dense[5].metrics["acc"].value, 4), "perplexity": 30.0}


def test_what_was_not_measured_says_so(folder: Path):
    record(folder, "dense", 0, "none", None)
    lines = quality_tables.quality_table().splitlines()[2:]
    assert len(lines) == 1 + 4 * 3 * 2
    assert all(recorded.NOT_MEASURED in line for line in lines)
    assert "20.00" in lines[0]


def test_only_a_clear_win_is_bold(folder: Path):
    record(folder, "shortgpt", 3, "ridge", None, perplexity=26.86)
    record(folder, "flattengpt", 3, "ridge", None, perplexity=26.82)
    assert "**" not in quality_tables.quality_table()
    record(folder, "finercut, fast", 3, "ridge", None, perplexity=26.4)
    table = quality_tables.quality_table()
    assert table.count("**") == 2 and "**26.40**" in table


def test_rows_of_other_rules_and_texts_do_not_count(folder: Path):
    record(folder, "finercut, fast", 3, "none", None, date="2026-11-26")
    record(folder, "shortgpt", 3, "none", None, date="2026-11-26", calibration="builtin")
    assert quality_tables.rows_of_quality() == []
    record(folder, "shortgpt", 3, "none", None, date="2026-11-26")
    record(folder, "finercut, fast", 3, "none", None, date="2026-11-28")
    assert len(quality_tables.rows_of_quality()) == 2


def test_scores_of_other_tasks_are_not_the_papers_mean(folder: Path):
    record(folder, "dense", 0, "none", results(1), tasks="piqa,winogrande,hellaswag,arc_easy,openbookqa")
    (row,) = quality_tables.quality_rows()
    assert row["perplexity"] == 20.0
    assert row["zero_shot"] is None and row["lambada"] is None


def test_what_repair_gains_by_text(folder: Path):
    record(folder, "shortgpt", 3, "none", None, perplexity=40.0, calibration="books")
    record(folder, "shortgpt", 3, "ridge", None, perplexity=35.0, calibration="books")
    line = next(line for line in quality_tables.texts_table().splitlines() if line.startswith("| shortgpt"))
    assert "5.0 (40.00 to 35.00)" in line
    assert line.count(recorded.NOT_MEASURED) == 5


def test_the_error_of_a_share_is_that_of_repeated_draws(folder: Path):
    """Of models that agree on 9 rows of 10: the spread of the share over many sets of rows."""
    found = []
    for seed in range(150):
        dense = results(seed)
        found.append(measured.kept_share(results(1000 + seed, dense), dense))
    spread = statistics.stdev(share.value for share in found)
    assert statistics.mean(share.stderr for share in found) == pytest.approx(spread, rel=0.2)


def test_no_table_uses_rows_of_an_uncommitted_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All recorded rows, as if measured with changes: every table is what it is without rows."""
    empty, dirty = tmp_path / "empty", tmp_path / "dirty"
    empty.mkdir()
    shutil.copytree(recorded.RESULTS, dirty)
    for path in dirty.glob("*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "commit": row["commit"].rstrip("+") + "+"} for row in rows)
    for name, make in tables.TABLES.items():
        monkeypatch.setattr(recorded, "RESULTS", dirty)
        found = make()
        monkeypatch.setattr(recorded, "RESULTS", empty)
        assert found == make(), name


def test_an_older_row_does_not_stand_in_for_an_unpublished_one(folder: Path):
    append(folder / "decode_cpu.csv", [{"case": "decode", "commit": "a"}, {"case": "load", "commit": "a"}])
    append(folder / "decode_cpu.csv", [{"case": "decode", "commit": "b+"}])
    assert list(recorded.newest("decode_cpu", "case")) == [("load",)]
