"""What the recorded rows say: speedups within one run, quality beside the dense model; spreads and rows with them."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tables

Row = Mapping[str, str]
WHERE = "_where"  # file:line, where a row ends
CPU = ("cpu", "cpu_alone")  # beside peers; ours alone, as the claims' commands run it
_RUN = ("model", "precision", "date", "commit", "command")


@dataclass(frozen=True)
class Found:
    """A measured number. low, high: its spread; None where the rows hold no repetition. rows: `file:line`.

    note: what a reader must know beside it; commit: of the code that was measured; stale: what newer rows say about
    a part of it alone.
    """

    value: float
    low: float | None
    high: float | None
    rows: tuple[str, ...]
    commit: str
    note: str = ""
    stale: str = ""

    def agrees(self, other: Found) -> bool:
        """Whether the spreads overlap."""
        mine, theirs = (self.low, self.high), (other.low, other.high)
        if None in mine or None in theirs:
            return self.value == other.value
        return mine[0] <= theirs[1] and theirs[0] <= mine[1]  # type: ignore[operator]


def read(name: str, folder: Path | None = None) -> list[dict[str, str]]:
    """Rows with their places; none where there is no file."""
    path = (folder or tables.RESULTS) / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return [{**row, WHERE: f"{path.name}:{reader.line_num}"} for row in reader]


def runs(rows: Sequence[Row], what: Sequence[str]) -> list[dict[tuple[str, ...], Row]]:
    """Rows that one command appended together, by their key `what`: only they may be compared with each other."""
    found: list[dict[tuple[str, ...], Row]] = []
    place: tuple[str, ...] = ()
    for row in rows:
        here = tuple(row.get(k, "") for k in _RUN)
        key = tuple(row[k] for k in what)
        if here != place or key in found[-1]:
            found.append({})
            place = here
        found[-1][key] = row
    return found


def cpu_runs(model: str, precision: str) -> list[dict[tuple[str, ...], Row]]:
    """Oldest first, by (runtime, variant, what)."""
    rows = [r for name in CPU for r in read(name) if (r["model"], r["precision"]) == (model, precision)]
    rows.sort(key=lambda r: r["date"])  # keeps the order of a day
    return runs(rows, ("runtime", "variant", "what"))


def cpu_speedups(variant: str, case: str, model: str, precision: str) -> list[Found]:
    """Of `variant` over our dense model, run by run, oldest first.

    The spread sets the quartiles of the two against each other, which is wider than that of paired ratios: the rows
    do not hold single rounds.
    """
    found: list[Found] = []
    for run in cpu_runs(model, precision):
        ours, dense = run.get(("ours", variant, case)), run.get(("ours", "dense", case))
        if ours is None or dense is None:
            if dense is not None and found:
                found[-1] = _stale(found[-1], dense)
            continue
        note = ""
        if ours["bytes_per_token"]:
            bound = float(dense["bytes_per_token"]) / float(ours["bytes_per_token"])
            shares = [f"{100 * float(r['of_limit']):.0f}%" for r in (dense, ours)]
            rates = [f"{float(r['median']):,.1f}" for r in (ours, dense)]
            note = f"{rates[0]} over {rates[1]} tokens/s; bytes alone {bound:.2f}x; dense ran at {shares[0]}, "
            note += f"pruned at {shares[1]} of read bandwidth"
        rows = tuple(r[WHERE] for r in (ours, dense))
        found.append(_ratio(ours, dense, rows, note))
    return found


def _stale(found: Found, dense: Row) -> Found:
    rate = f"dense alone was measured again since: {float(dense['median']):,.1f} {dense['unit']}, {dense[WHERE]}"
    return dataclasses.replace(found, stale=rate)


def gpu_speedups(model: str, runtime: str, case: str, settings: str) -> list[Found]:
    """The same of gpu.csv, whose rows hold the paired ratio."""
    found = []
    for run in runs([r for r in read("gpu") if r["model"] == model], ("runtime", "case", "settings")):
        for (own, what, how), row in run.items():
            if (own, what) != (runtime, case) or not how.startswith(settings) or not row["ratio"]:
                continue
            dense = run.get(("ours dense", case, how))
            if dense is not None:
                rows = tuple(r[WHERE] for r in (row, dense))
                ratio = _ratio(row, dense, rows, f"{row['machine']}; {how}")
                found.append(Found(float(row["ratio"]), ratio.low, ratio.high, rows, row["commit"], ratio.note))
    return found


def _ratio(row: Row, dense: Row, rows: tuple[str, ...], note: str) -> Found:
    low, value, high = (float(row[a]) / float(dense[b]) for a, b in (("q1", "q3"), ("median", "median"), ("q3", "q1")))
    return Found(value, low, high, rows, row["commit"], note)


def _quality(variant: str, blocks: int, repair: str) -> list[Row]:
    """The last row of every seed, calibrated on WikiText-2; rows with zero-shot accuracy first."""
    rows = [
        r
        for r in read("quality")
        if (r["variant"], r["blocks_fewer"], r["repair"], r["calibration"])
        == (variant, str(blocks), repair, "wikitext2")
    ]
    return list({**tables.last(rows, "seed"), **tables.last([r for r in rows if r["tasks"]], "seed")}.values())


def perplexity_ratio(variant: str, blocks: int, repair: str) -> Found | None:
    """Times the dense perplexity; mean and standard deviation over seeds where there are several."""
    rows, dense = _quality(variant, blocks, repair), _quality("dense", 0, "none")
    if not rows or not dense:
        return None
    values = [float(r["perplexity"]) / float(dense[-1]["perplexity"]) for r in rows]
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    used = tuple(r[WHERE] for r in (*rows, dense[-1]))
    note = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
    low, high = (None, None) if deviation is None else (mean - deviation, mean + deviation)
    return Found(mean, low, high, used, rows[-1]["commit"], note)


CHANCE = 35.0  # mean of PIQA and WinoGrande (2 choices), HellaSwag, ARC-easy and OpenBookQA (4)


def zero_shot_kept(variant: str, blocks: int, repair: str) -> Found | None:
    """Per cent of the dense mean accuracy. The standard errors are added as if the two were independent: too wide."""
    scored = [r for r in _quality(variant, blocks, repair) if r["accuracy"]]
    dense = [r for r in _quality("dense", 0, "none") if r["accuracy"]]
    if not scored or not dense:
        return None
    base = tables.zero_shot(dense[-1])
    each = [found for r in scored if (found := tables.zero_shot(r)) is not None]
    assert base is not None
    mean = statistics.mean(m for m, _ in each)
    value = 100 * mean / base[0]
    error = value * math.hypot(each[0][1] / mean, base[1] / base[0])
    above = 100 * (mean - CHANCE) / (base[0] - CHANCE)
    rows = tuple(r[WHERE] for r in (*scored, dense[-1]))
    note = f"{above:.0f}% of what the dense model has above chance; plain accuracy, OpenBookQA for ARC-challenge; "
    note += f"{len(each)} seed{'s' if len(each) > 1 else ''}"
    return Found(value, value - error, value + error, rows, scored[-1]["commit"], note)


def quantized_ratio(variant: str, base: str) -> Found | None:
    """Perplexity of one row of quantization.csv over that of another."""
    rows = tables.last(read("quantization"), "variant")
    one, other = rows.get((variant,)), rows.get((base,))
    if one is None or other is None:
        return None
    value = float(one["perplexity"]) / float(other["perplexity"])
    return Found(value, None, None, tuple(r[WHERE] for r in (one, other)), one["commit"])
