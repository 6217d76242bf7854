"""A picture of what pruning left: the parent's blocks by depth and type, kept, merged or dropped.

Works from the JSON of `describe.inspect` alone. Where the plan holds a ranking, a dropped sub-layer is
coloured by the distance from the dense model when it went, and carries its place in the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthprune_runtime.errors import InputError, printable

_ROWS = (("attention", 1), ("ffn", 0))  # kind, height in the picture
_KEPT = "#c9d3df"
_MERGED = "#5b84b1"
_DROPPED = "#f4f4f4"  # where nothing is known but that it went
_SCALE = "YlOrRd"
_SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class _Gone:
    """What is known about a dropped sub-layer: its place in the order of removal, and the distance then."""

    order: int
    value: float


def removals(plan: dict[str, Any] | None) -> tuple[dict[tuple[str, int], _Gone], str]:
    """Order and distance of what a plan removed.

    Returns:
        (kind, block) -> what the plan's settings say of it, empty where they say nothing; what its values mean.
    """
    settings: dict[str, Any] = plan.get("settings", {}) if plan is not None else {}
    if ranking := settings.get("ranking"):
        found = {(s["kind"], s["block"]): _Gone(s["step"], s["distance"]) for s in ranking}
        return found, f"distance after its removal ({_shown(settings['distance'])})"
    order = settings.get("removal_order")
    if isinstance(order, list):
        known = {(kind, block): _Gone(n, float(n)) for n, block in enumerate(order, 1) for kind, _ in _ROWS}
        return known, "order of removal"
    return {}, ""


def _plan_of_blocks(description: dict[str, Any]) -> dict[str, Any] | None:
    """The plan, if its order of removal names blocks of the dense parent."""
    plan: dict[str, Any] | None = description["plan"]
    settings = {} if plan is None else plan.get("settings", {})
    renumbered = bool(description["provenance"].get("plans")) and "ranking" not in settings
    return None if renumbered else plan


def _shown(text: object) -> str:
    """A text out of a file, short, and without what matplotlib would read as a formula."""
    return printable(text, 80).replace("$", r"\$")


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """(first, length) of each run of consecutive blocks."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and block == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


def _cell(axes: Any, first: int, length: int, height: int, colour: Any, text: str, dark: bool = False) -> None:
    """One rectangle over `length` blocks, with its text in the middle."""
    axes.barh(height, length - 0.1, 0.86, first - 0.45, color=colour, edgecolor="#8a949e", linewidth=0.6)
    if text:
        axes.text(
            first + (length - 1) / 2, height, text, ha="center", va="center", fontsize=8, color="w" if dark else "k"
        )


def _draw_kept(axes: Any, description: dict[str, Any]) -> set[tuple[str, int]]:
    """Draw what is still there; returns its (kind, block)."""
    heights = dict(_ROWS)
    kept = set()
    for sublayer in description["sublayers"]:
        kind, origin = sublayer["kind"], sublayer["origin"]
        kept |= {(kind, block) for block in origin}
        merged = len(origin) > 1
        for first, length in _runs(origin):
            text = f"{len(origin)}" if merged else ""
            _cell(axes, first, length, heights[kind], _MERGED if merged else _KEPT, text, dark=merged)
    return kept


def _draw_dropped(figure: Any, axes: Any, description: dict[str, Any], missing: list[tuple[str, int]]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    heights = dict(_ROWS)
    known, label = removals(_plan_of_blocks(description))
    values = [known[m].value for m in missing if m in known]
    scale: Any = ScalarMappable(Normalize(min(values, default=0.0), max(values, default=1.0)), _SCALE)
    for kind, block in missing:
        gone = known.get((kind, block))
        if gone is None:
            _cell(axes, block, 1, heights[kind], _DROPPED, "x")
            continue
        colour = scale.to_rgba(gone.value)
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.55  # perceived brightness
        _cell(axes, block, 1, heights[kind], colour, str(gone.order), dark)
    if len(set(values)) > 1:
        figure.colorbar(scale, ax=axes, location="bottom", label=label, aspect=60, shrink=0.6, pad=0.02)


def _legend(axes: Any, merged: bool, ordered: bool) -> None:
    from matplotlib.patches import Patch

    entries = [("kept", _KEPT)]
    if merged:
        entries.append(("merged, from so many blocks", _MERGED))
    entries.append(("dropped, in this order" if ordered else "x: dropped", "#fd9f44" if ordered else _DROPPED))
    handles = [Patch(facecolor=c, edgecolor="#8a949e", label=t) for t, c in entries]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=9)


def plot_map(
    description: dict[str, Any], path: str | Path, overwrite: bool = False, sources: Sequence[Path] = ()
) -> None:
    """Draw the map of a model described by `describe.inspect` into `path`, .png or .svg.

    overwrite: let `path` replace a file that is there, but never one of `sources`, the model's own. Raises InputError
    without matplotlib, and for another kind of file.
    """
    from depthprune_runtime.checkpoint.container import atomic_file
    from depthprune_runtime.checkpoint.outputs import as_path, check_destination

    target = as_path(path, "output")
    if target.suffix not in _SUFFIXES:
        raise InputError(f"output {target}: expected a name that ends in {' or '.join(_SUFFIXES)}")
    check_destination(target, sources, overwrite)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"plots need matplotlib ({error}); pip install 'depthprune_runtime[plot]'") from error
    depth = description["provenance"]["blocks"]
    figure = Figure(figsize=(max(7.0, 0.27 * depth + 1.6), 3.0), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.subplots()
    kept = _draw_kept(axes, description)
    missing = [(kind, block) for kind, _ in _ROWS for block in range(depth) if (kind, block) not in kept]
    _draw_dropped(figure, axes, description, missing)
    plan = description["plan"]
    what = plan["method"] if plan is not None else "dense"
    name = Path(description["name"]).name
    axes.set_title(f"{_shown(name)} ({_shown(what)}), {description['parameters'] / 1e6:,.1f} M parameters", pad=26)
    _legend(
        axes,
        any(len(s["origin"]) > 1 for s in description["sublayers"]),
        bool(removals(_plan_of_blocks(description))[0]),
    )
    axes.set_xlim(-0.7, depth - 0.3)
    axes.set_ylim(-0.55, 1.55)
    axes.set_xticks(range(0, depth, 1 if depth <= 12 else 2 if depth <= 40 else 5))
    axes.set_yticks([height for _, height in _ROWS], [kind if kind != "ffn" else "FFN" for kind, _ in _ROWS])
    axes.set_xlabel("block of the dense parent")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    with atomic_file(target, overwrite) as file:
        figure.savefig(file, format=target.suffix[1:], dpi=150)
