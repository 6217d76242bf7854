"""README tables of FinerCut's searches and of the memory that pruning takes, from the rows under benchmarks/results."""

from __future__ import annotations

import json

from report.rows import markdown, newest


def finercut_table() -> str:
    """The last comparison: searches as shares of the plain loop."""
    rows = newest("finercut", "search")
    lines = [
        [
            name,
            f"{float(row['evaluations_of_plain']):.3f}",
            f"{float(row['cpu_s_of_plain']):.3f} ({float(row['cpu_s']):.0f} s)",
            " ".join(str(i) for i in json.loads(row["ranking"])),
            f"{float(row['perplexity']):.2f}",
        ]
        for name in ("plain loop", "exact", "fast")
        if (row := rows.get((name,))) is not None
    ]
    heads = ("search", "sub-layer evaluations", "CPU time", "sub-layers removed, in order", "perplexity")
    return markdown(heads, lines)


def memory_table() -> str:
    """Peak anonymous memory of each configuration of the last run."""
    rows = newest("memory", "method", "repair", "model", "blocks_fewer")
    lines = [
        [
            f"{row['method'].partition(',')[0]}, repair {row['repair']}",
            f"{int(row['model_mb']):,} MB",
            f"{int(row['peak_anon_mb']):,} MB",
            f"{int(row['start_anon_mb']):,} MB",
            f"{float(row['seconds']):.0f} s",
        ]
        for row in rows.values()
    ]
    return markdown(("", "weights", "peak anonymous memory", "of it the interpreter", "time"), lines)
