"""What the recorded rows say: speedups within one run, quality beside the dense model; spreads and rows with them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import zero_shot
from report import quality_tables
from report.rows import WHERE, Row, last, newest, read

from depthprune_runtime.evaluation.results import Metric, TaskResult

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
        for r in quality_tables.rows_of_quality()
        if (r["variant"], r["blocks_fewer"], r["repair"], r["calibration"])
        == (variant, str(blocks), repair, "wikitext2")
    ]
    with_scores = [r for r in rows if quality_tables.scored(r)]
    return list({**last(rows, "seed"), **last(with_scores, "seed")}.values())


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


CHANCE = 35.0  # mean of PIQA and WinoGrande (2 choices), HellaSwag, ARC-easy and ARC-challenge (4)


def kept_share(ours: Sequence[TaskResult], dense: Sequence[TaskResult]) -> Metric:
    """Ours over dense, both the papers' mean, with the standard error of the paired rows.

    To first order the error of a/b is that of a - (a/b) b, over b.
    """
    pairs = [
        (a.hits[a.paper_metric], b.hits[a.paper_metric])
        for task in zero_shot.PAPER_TASKS
        for a in ours
        for b in dense
        if a.task == b.task == task
    ]
    base = Metric.mean_of_tasks([Metric.mean(b) for _, b in pairs]).value
    share = Metric.mean_of_tasks([Metric.mean(a) for a, _ in pairs]).value / base
    errors = [Metric.mean([x - share * y for x, y in zip(a, b, strict=True)]) for a, b in pairs]
    stderr = Metric.mean_of_tasks(errors).stderr
    return Metric(share, None if stderr is None else stderr / base)


def zero_shot_kept(variant: str, blocks: int, repair: str) -> Found | None:
    """Per cent of the dense mean accuracy, seed 0."""
    row, base = (
        next((r for r in _quality(*which) if r["seed"] == "0" and quality_tables.scored(r)), None)
        for which in ((variant, blocks, repair), ("dense", 0, "none"))
    )
    if row is None or base is None:
        return None
    ours, dense = quality_tables.single_rows(row), quality_tables.single_rows(base)
    if ours is None or dense is None:
        return None
    share, score, whole = kept_share(ours, dense), quality_tables.score(row), quality_tables.score(base)
    assert score is not None and whole is not None
    value, error = 100 * share.value, 100 * (share.stderr or 0.0)
    above = 100 * (score.value - CHANCE) / (whole.value - CHANCE)
    note = f"{above:.0f}% of what the dense model has above chance; paired standard error; seed 0"
    rows = tuple(r[WHERE] for r in (row, base))
    return Found(value, value - error, value + error, rows, row["commit"], note)


def quantized_ratio(variant: str, base: str) -> Found | None:
    """Perplexity of one row of quantization.csv over that of another."""
    rows = newest("quantization", "variant")
    one, other = rows.get((variant,)), rows.get((base,))
    if one is None or other is None:
        return None
    value = float(one["perplexity"]) / float(other["perplexity"])
    return Found(value, None, None, tuple(r[WHERE] for r in (one, other)), one["commit"])
