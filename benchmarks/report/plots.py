"""Plots of the report as inline SVG: text stays text and takes the page's colour, so light and dark both read."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from public_models import SPECS
from report import measured, quality_tables
from report.rows import last, newest, read

WIDTH = 5.2  # inches: about the points of a phone's width, so that text keeps its size there
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3b82c4", "#e08a1e", "#3fa66b", "#b35fc4", "#d0544f", "#8a949e"
_INK = "#010203"  # stands for the page's text colour until the SVG is written
CASES = {"decode1@32": BLUE, "decode1@1024": PURPLE, "decode8": GREEN, "prefill512": ORANGE}
MARKERS = {"shortgpt 25%": "o", "finercut 25%": "s", "flattengpt 20%": "D", "flattengpt wide": "^"}
METHODS = {"shortgpt": BLUE, "finercut, fast": GREEN, "flattengpt": ORANGE}


@dataclass(frozen=True)
class Plot:
    """name: of its ids; alt: what it shows, in a sentence; note: what to know when reading it."""

    name: str
    title: str
    alt: str
    note: str
    svg: str


def _figure(height: float, rows: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with rc_context({**ink, "font.size": 9, "axes.facecolor": "none"}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)  # no window, no global state
        axes = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for one in axes:
        one.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(name: str, figure: Any, alt: str) -> str:
    """Without prolog and metadata; ids get the plot's name, since several stand in one page."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(
        r'<svg[^>]*viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{alt}">', text, count=1
    )
    return re.sub(_INK, "currentColor", text).strip()


def _legend(axes: Any, entries: Sequence[Any], columns: int) -> None:
    legend = axes.legend(
        handles=list(entries), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, fontsize=8
    )
    for text in legend.get_texts():
        text.set_color(_INK)


def _marks(**more: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"linestyle": "none", "color": GREY} | more)


def removed_shares(model: str) -> dict[str, float]:
    """Per cent of all parameters that each variant of bench_cpu lacks."""
    from peers.weights import MODELS

    from depthprune_runtime.pruning.plan import PrunePlan
    from depthprune_runtime.pruning.surgery import pruned_spec

    dense = SPECS[model]
    return {
        variant: 100
        * (
            1
            - pruned_spec(dense, PrunePlan(variant.split()[0], "0" * 64, edits)).num_parameters()
            / dense.num_parameters()
        )
        for variant, edits in MODELS[model].plans(dense).items()
    }


def speedup() -> Plot | None:
    shares = removed_shares("smollm2-135m")
    figure, axes = _figure(8.2, rows=3)
    points = 0
    for one, precision in zip(axes, ("bf16", "int8", "int4"), strict=True):
        for place, (case, colour) in enumerate(CASES.items()):
            for variant, marker in MARKERS.items():
                found = measured.cpu_speedups(variant, case, "smollm2-135m", precision)
                if not found:
                    continue
                last = found[-1]
                assert last.low is not None and last.high is not None
                spread = [[max(0, last.value - last.low)], [max(0, last.high - last.value)]]
                x = shares[variant] + 0.45 * (place - 1.5)
                one.errorbar(x, last.value, spread, fmt=marker, color=colour, markersize=5, linewidth=1, capsize=2)
                points += 1
        xs = [0.5 * i for i in range(61)]
        one.plot(xs, [100 / (100 - x) for x in xs], "--", color=GREY, linewidth=1)
        one.set_ylabel(f"speedup, {precision}")
        one.set_xlim(-2, 30)
    axes[-1].set_xlabel("parameters removed, %")
    names = [_marks(marker="o", color=c, label=case) for case, c in CASES.items()]
    names += [_marks(marker=m, label=variant) for variant, m in MARKERS.items()]
    _legend(axes[0], [*names, _marks(linestyle="--", label="1 / (1 - removed)")], 3)
    alt = "Speedup of pruned SmolLM2-135M over dense against the share of parameters removed, for three precisions"
    note = (
        "Each point is pruned over dense in one run of bench_cpu.py, the last that has both; bars are the range that "
        "the quartiles of both allow. Points of one method stand slightly apart to be told from each other. Above the "
        "dashed line a model gains more than its size alone explains; the claims say how much bandwidth was used."
    )
    return Plot("speedup", "Speedup against sparsity", alt, note, _svg("speedup", figure, alt)) if points else None


@dataclass(frozen=True)
class Point:
    megabytes: float
    perplexity: float
    label: str
    kind: str  # dense, quantised, or a method
    repaired: bool = False


def quality_points() -> list[Point]:
    """SmolLM2 pruned (two bytes a parameter; the tied embedding is read as the head) and quantised."""
    found = []
    for row in quality_tables.quality_rows():
        if row["variant"] in quality_tables.MAIN:
            label = f"{row['variant']} -{row['blocks_fewer']}" if row["blocks_fewer"] else "dense"
            kind = row["variant"]
            found.append(Point(2e-6 * row["parameters"], row["perplexity"], label, kind, row["repair"] == "ridge"))
    for (variant,), row in newest("quantization", "variant").items():
        pruned = "shortgpt" in variant
        if variant == "bf16" or (pruned and "int" not in variant):
            continue  # not quantised: in quality.csv
        kind = "both" if pruned else "quantised"
        found.append(Point(float(row["weight_mb"]), float(row["perplexity"]), variant, kind))
    return found


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both, smallest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.megabytes, p.perplexity)):
        if not best or point.perplexity < best[-1].perplexity:
            best.append(point)
    return best


def pareto() -> Plot | None:
    points = quality_points()
    if not points:
        return None
    figure, (axes,) = _figure(4.6)
    colours = {**METHODS, "dense": GREY, "quantised": RED, "both": PURPLE}
    for point in points:
        filled = point.repaired or point.kind not in METHODS
        face = colours[point.kind] if filled else "none"
        axes.plot(point.megabytes, point.perplexity, "o", color=colours[point.kind], markerfacecolor=face, markersize=6)
    best = front(points)
    axes.plot([p.megabytes for p in best], [p.perplexity for p in best], "-", color=_INK, linewidth=0.8, zorder=0)
    for point in best:
        axes.annotate(
            point.label,
            (point.megabytes, point.perplexity),
            (4, -11),
            textcoords="offset points",
            fontsize=7,
            color=_INK,
        )
    axes.set_yscale("log")
    axes.set_yticks([25, 35, 50, 75, 100, 150, 300], labels=["25", "35", "50", "75", "100", "150", "300"])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.set_xlabel("weights read per token at batch 1, MB")
    axes.set_ylabel("WikiText-2 test perplexity")
    entries = [_marks(marker="o", color=c, label=name) for name, c in colours.items() if name != "both"]
    entries += (
        [_marks(marker="o", color=PURPLE, label="pruned and quantised")]
        if any(p.kind == "both" for p in points)
        else []
    )
    hollow = _marks(marker="o", markerfacecolor="none", label="without repair")
    _legend(axes, [*entries, hollow, _marks(linestyle="-", color=_INK, label="Pareto front")], 3)
    alt = "Perplexity against weight bytes read per token for pruned and quantised SmolLM2-135M with the Pareto front"
    note = (
        "Bytes follow exactly from the shapes and stand for latency, which was not measured for these very models: "
        "a decode step at batch 1 reads every weight once. Fewer bytes and a lower perplexity are better."
    )
    return Plot("pareto", "Perplexity against bytes per token", alt, note, _svg("pareto", figure, alt))


def roofline() -> Plot | None:
    rows = [r for r in read("cpu") if r["model"] == "smollm2-135m" and r["what"] == "decode1@32" and r["of_limit"]]
    counted = last(rows, "precision", "runtime", "variant")
    if not counted:
        return None
    commits = {row["precision"]: row["commit"] for row in rows}  # the last row of each counts
    order = sorted(counted, key=lambda k: (("bf16", "int8", "int4").index(k[0]), k[1] == "ours"))
    figure, (axes,) = _figure(0.9 + 0.24 * len(order))
    for place, key in enumerate(order):
        share = 100 * float(counted[key]["of_limit"])
        colour, alpha = BLUE if key[1] == "ours" else GREY, 1.0 if counted[key]["commit"] == commits[key[0]] else 0.4
        axes.barh(-place, share, 0.72, color=colour, alpha=alpha)
        axes.text(share + 1, -place, f"{share:.0f}", va="center", fontsize=7.5, color=_INK)
    names = [f"{p} {v if r == 'ours' else r}" for p, r, v in order]
    axes.set_yticks([-i for i in range(len(order))], labels=names, fontsize=8)
    axes.set_ylim(-len(order) + 0.4, 0.6)
    axes.set_xlim(0, 115)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("% of the read bandwidth")
    alt = "Share of the measured read bandwidth that decoding at batch 1 reaches, by precision, runtime and variant"
    note = (
        "Tokens a second times bytes a token, over the bandwidth of a plain read in the same turns, which differs "
        "much from run to run on this shared machine. Blue is ours; faded bars are of an older run than the full ones."
    )
    return Plot("roofline", "Share of the roofline, decode at batch 1", alt, note, _svg("roofline", figure, alt))


def profile() -> Plot | None:
    rows = newest("profile_cpu", "model", "variant", "precision", "context", "part")
    cases = list(dict.fromkeys(key[1:4] for key in rows if key[0] == "smollm2-135m"))
    if not cases:
        return None
    figure, (axes,) = _figure(1.1 + 0.3 * len(cases))
    parts = {"ends": GREY, "ffn": GREEN, "attention": BLUE}
    for place, case in enumerate(cases):
        left = 0.0
        for part, colour in parts.items():
            width = float(rows[("smollm2-135m", *case, part)]["median_ms"])
            axes.barh(-place, width, 0.7, left, color=colour)
            left += width
        whole = rows[("smollm2-135m", *case, "whole")]
        median, q1, q3 = (float(whole[f"{k}_ms"]) for k in ("median", "q1", "q3"))
        axes.errorbar(
            median, -place, xerr=[[median - q1], [q3 - median]], fmt="|", color=_INK, markersize=11, capsize=2
        )
    names = [f"{variant}, {precision}, {context}" for variant, precision, context in cases]
    axes.set_yticks([-i for i in range(len(cases))], labels=names, fontsize=8)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms a step")
    entries = [_marks(marker="s", color=c, label=part) for part, c in parts.items()]
    _legend(axes, [*entries, _marks(marker="|", color=_INK, label="whole step")], 4)
    alt = (
        "Milliseconds of a decode step by attention, FFN and ends, for dense and pruned shapes, precisions and contexts"
    )
    threads = {r["threads"] for r in rows.values()}
    note = (
        f"By leaving sub-layers of a kind out (bench_profile.py), batch 1, threads: {', '.join(sorted(threads))}, at "
        "the context named last; the parts need not add up to the whole, whose quartiles the mark shows."
    )
    return Plot("profile", "Where the time of a decode step goes", alt, note, _svg("profile", figure, alt))


PLOTS: tuple[Callable[[], Plot | None], ...] = (speedup, pareto, roofline, profile)
