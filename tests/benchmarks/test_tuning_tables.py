"""What finercut/method.py says of the repair's strength, against the rows that it names."""

from __future__ import annotations

import csv
import re

from report.rows import RESULTS
from report.tuning_tables import strength_table, strengths

from depthprune_runtime.pruning.finercut.method import FinerCut


def test_the_strength_after_finercut_is_the_least_that_keeps_the_perplexity():
    found = strengths()
    assert {blocks for _, blocks in found} == {6, 9}
    for values in found.values():
        kept = [value for value, (perplexity, _) in values.items() if perplexity <= values[1.0][0]]
        assert min(kept) == FinerCut.repair_strength > min(values)  # a lesser one was tried, and is worse


def test_the_table_says_what_the_rows_say():
    with (RESULTS / "tuning.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["knob"] == "strength"]
    lines = re.findall(r"^\| (\d+) \| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|", strength_table(), re.M)
    assert {(b, m, float(v), float(p)) for b, m, v, p in lines} == {
        (r["blocks_fewer"], r["method"], float(r["value"]), round(float(r["perplexity_valid"]), 2)) for r in rows
    }
