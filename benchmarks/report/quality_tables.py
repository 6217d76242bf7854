"""Tables and plot of what pruning costs in quality, from quality.csv and quality_rows.csv.

Zero-shot is the papers' mean: PIQA, WinoGrande, HellaSwag, ARC-easy and ARC-challenge, acc_norm where it exists.
Differences are between models scored on the same rows, so their standard errors are those of the paired rows. Rows
of other tasks count for their perplexity alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zero_shot
from report.rows import NOT_MEASURED, Row, last, markdown, read

from depthprune_runtime.evaluation.results import Metric, TaskResult, paired_papers_mean

MAIN = ("dense", "shortgpt", "finercut, fast", "flattengpt")
DEPTHS = (2, 3, 6, 9)  # of 30 blocks fewer
# Rows from before are of other rules, or of another text under the same name: (column, beginning of its value, date).
SINCE = (
    ("variant", "finercut", "2026-11-28"),  # protected one block fewer than the official code
    ("variant", "flatten", "2026-11-28"),  # another strength of the compensation, and fewer windows of similarity
    ("calibration", "builtin", "2026-11-28"),  # shared paragraphs with builtin-test
)
TIE = 1.01  # perplexities closer than this count as equal


def counts(row: Row) -> bool:
    return not any(row[column].startswith(value) and row["date"] < date for column, value, date in SINCE)


def rows_of_quality() -> list[dict[str, str]]:
    """All rows that still say something about this version."""
    return [row for row in read("quality") if counts(row)]


def scored(row: Row) -> bool:
    """Whether it has the zero-shot accuracies that tables report."""
    return row["tasks"] == zero_shot.REPORTED


def score(row: Row) -> Metric | None:
    """The papers' mean in per cent."""
    if not scored(row):
        return None
    stored = json.loads(row["accuracy"])[zero_shot.MEAN]
    return Metric(100 * stored["value"], 100 * stored["stderr"])


def single_rows(row: Row) -> list[TaskResult] | None:
    """Which rows of the tasks it got right."""
    key = tuple(row[k] for k in zero_shot.KEY)
    return zero_shot.recorded(read("quality_rows")).get(key) if scored(row) else None


def difference(ours: Row | None, theirs: Row | None) -> Metric | None:
    """Of the papers' means in points, paired; None where one was not measured."""
    if ours is None or theirs is None:
        return None
    mine, others = single_rows(ours), single_rows(theirs)
    if mine is None or others is None:
        return None
    found = paired_papers_mean(mine, others)
    return None if found is None or found.stderr is None else Metric(100 * found.value, 100 * found.stderr)


def _chosen(rows: Sequence[Row], *key: str) -> dict[tuple[str, ...], Row]:
    """The last row of every configuration, of those with zero-shot accuracy where there are any."""
    return {**last(rows, *key), **last([r for r in rows if scored(r)], *key)}


def _main_rows() -> dict[tuple[str, ...], Row]:
    """By (variant, blocks fewer, repair): seed 0, calibrated on WikiText-2."""
    rows = [r for r in rows_of_quality() if r["seed"] == "0" and r["calibration"] == "wikitext2"]
    return _chosen(rows, "variant", "blocks_fewer", "repair")


def quality_rows() -> list[dict[str, Any]]:
    """One a variant, depth and repair, in the order of the table."""
    found = _main_rows()
    order = sorted(found.values(), key=lambda r: (int(r["blocks_fewer"]), r["variant"], r["repair"]))
    dense = found.get(("dense", "0", "none"))
    return [
        {
            "blocks_fewer": int(r["blocks_fewer"]),
            "variant": r["variant"],
            "repair": r["repair"],
            "parameters": int(r["parameters"]),
            "perplexity": float(r["perplexity"]),
            "zero_shot": _pair(score(r)),
            "to_dense": _pair(difference(r, dense)) if r["variant"] != "dense" else None,
            "by_repair": _pair(difference(r, found.get((r["variant"], r["blocks_fewer"], "none"))))
            if r["repair"] != "none"
            else None,
            "lambada": json.loads(r["accuracy"])["lambada_openai"] if scored(r) else None,
            "prune_s": float(r["prune_s"]),
            "peak_mb": int(r["peak_mb"]),
        }
        for r in order
    ]


def _pair(metric: Metric | None) -> tuple[float, float] | None:
    return None if metric is None or metric.stderr is None else (metric.value, metric.stderr)


def _plain(pair: tuple[float, float] | None, missing: str = NOT_MEASURED) -> str:
    return missing if pair is None else f"{pair[0]:.1f} ± {pair[1]:.1f}"


def _signed(pair: tuple[float, float] | None, missing: str = NOT_MEASURED) -> str:
    return missing if pair is None else f"{pair[0]:+.1f} ± {pair[1]:.1f}"


def winner(values: Sequence[float]) -> float | None:
    """The least of them if it is more than a tie below every other; None also where there is nothing to beat."""
    least, *others = sorted(values)
    return least if others and others[0] > TIE * least else None


def quality_table() -> str:
    """Every method at every depth; what has no row says so."""
    rows = {(r["blocks_fewer"], r["variant"], r["repair"]): r for r in quality_rows() if r["variant"] in MAIN}
    wanted = [(0, "dense", "none")]
    wanted += [(b, variant, repair) for b in DEPTHS for variant in sorted(MAIN[1:]) for repair in ("none", "ridge")]
    order = sorted({*wanted, *rows})
    lines = []
    for key in order:
        blocks, variant, repair = key
        start = [str(blocks), variant, repair if blocks else ""]
        if key not in rows:
            lines.append([*start, "", NOT_MEASURED, *[""] * 6])
            continue
        row = rows[key]
        best = winner([r["perplexity"] for r in rows.values() if r["blocks_fewer"] == blocks])
        value, lambada = f"{row['perplexity']:.2f}", row["lambada"]
        words = NOT_MEASURED if lambada is None else f"{100 * lambada['acc']:.1f} ({lambada['perplexity']:.1f})"
        lines.append(
            [
                *start,
                f"{row['parameters'] / 1e6:.1f} M",
                f"**{value}**" if row["perplexity"] == best else value,
                _plain(row["zero_shot"]),
                _signed(row["to_dense"]) if blocks else "",
                _signed(row["by_repair"]) if repair != "none" else "",
                words,
                f"{row['prune_s']:.0f} s" if blocks else "",
                f"{row['peak_mb']} MB" if blocks else "",
            ]
        )
    heads = (
        "blocks fewer", "method", "repair", "parameters", "perplexity", "zero-shot", "to dense", "by repair",
        "LAMBADA (perplexity)", "prune", "peak memory",
    )  # fmt: skip
    return markdown(heads, lines)


def ablation_table() -> str:
    found = {(r["variant"], r["repair"]): r for r in quality_rows() if r["blocks_fewer"] == 3}
    steps = [
        ("flattened, left wide", "flattened, wide", "none"),
        ("+ heads narrowed", "flattened, heads narrowed", "none"),
        ("+ channels narrowed", "flattened, heads and channels", "none"),
        ("+ compensation = FlattenGPT as printed", "flattengpt", "none"),
        ("+ repair", "flattengpt, paper's choices", "ridge"),
        ("+ our grouping and selection = default", "flattengpt", "ridge"),
    ]
    lines = []
    for label, variant, repair in steps:
        row = found.get((variant, repair))
        cells = [NOT_MEASURED] * 2 if row is None else [f"{row['parameters'] / 1e6:.1f} M", f"{row['perplexity']:.2f}"]
        lines.append([label, *cells])
    return markdown(("3 of 30 blocks fewer", "parameters", "perplexity"), lines)


def seeds_table() -> str:
    """Spread over calibration seeds of the repaired methods."""
    rows = [
        r
        for r in rows_of_quality()
        if r["variant"] in MAIN and (r["repair"], r["calibration"]) == ("ridge", "wikitext2")
    ]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in _chosen(rows, "variant", "blocks_fewer", "seed").values():
        groups.setdefault((row["variant"], int(row["blocks_fewer"])), []).append(row)
    lines = []
    for (variant, blocks), found in sorted(groups.items(), key=lambda g: (g[0][1], g[0][0])):
        if len(found) > 1:
            values = [float(r["perplexity"]) for r in found]
            spread = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            lines.append([str(blocks), variant, str(len(found)), spread])
    return markdown(("blocks fewer", "method", "seeds", "perplexity, repaired"), lines)


TEXTS = ("wikitext2", "books", "builtin")


def gains(blocks: int) -> dict[str, dict[str, dict[str, Row]]]:
    """Rows at one depth, by method, calibration text and repair; seed 0."""
    rows = [r for r in rows_of_quality() if r["seed"] == "0" and r["blocks_fewer"] == str(blocks)]
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for (variant, text, repair), row in _chosen(rows, "variant", "calibration", "repair").items():
        if variant in MAIN and text in TEXTS:
            found.setdefault(variant, {}).setdefault(text, {})[repair] = row
    return found


def _gain(pair: Mapping[str, Row]) -> str:
    if not {"none", "ridge"} <= set(pair):
        return NOT_MEASURED
    before, after = (float(pair[repair]["perplexity"]) for repair in ("none", "ridge"))
    return f"{before - after:.1f} ({before:.2f} to {after:.2f})"


def texts_table() -> str:
    """What repair gains on WikiText-2 test, by the text it was calibrated on."""
    found = gains(3)
    lines = []
    for variant in MAIN[1:]:
        texts = found.get(variant, {})
        cells = [_gain(texts.get(text, {})) for text in TEXTS]
        points = [
            _signed(_pair(difference(pair.get("ridge"), pair.get("none"))))
            for pair in (texts.get(text, {}) for text in TEXTS)
        ]
        lines.append([variant, *(cell for both in zip(cells, points, strict=True) for cell in both)])
    heads = [f"{text}: {what}" for text in TEXTS for what in ("perplexity", "zero-shot")]
    return markdown(("3 of 30 blocks fewer", *heads), lines)


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "depthprune"  # the same file from the same rows
    import matplotlib.pyplot as plt

    rows = quality_rows()
    figure, axes = plt.subplots(figsize=(7, 4))
    dense = next((r for r in rows if r["variant"] == "dense"), None)
    for index, variant in enumerate(MAIN[1:]):
        for repair, style in (("none", "--"), ("ridge", "-")):
            own = [r for r in rows if r["variant"] == variant and r["repair"] == repair]
            points = ([dense] if dense else []) + own
            if own:
                axes.plot(
                    [p["parameters"] / 1e6 for p in points],
                    [p["perplexity"] for p in points],
                    style, marker="o", color=f"C{index}", label=f"{variant}, repair {repair}",
                )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")  # not powers of ten
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.invert_xaxis()
    axes.set_xlabel("parameters left (millions, embeddings included)")
    axes.set_ylabel("WikiText-2 test perplexity")
    axes.set_title("SmolLM2-135M-Instruct made shallower")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
