"""What our own numbers were chosen by, from tuning.csv: rows that no other table reports."""

from __future__ import annotations

from report.rows import markdown, read


def strengths() -> dict[tuple[str, int], dict[float, tuple[float, float]]]:
    """(method, blocks fewer) -> strength -> (perplexity of WikiText-2 valid, mean acc_norm in per cent)."""
    found: dict[tuple[str, int], dict[float, tuple[float, float]]] = {}
    for row in read("tuning"):
        if row["knob"] == "strength":
            measured = float(row["perplexity_valid"]), 100 * float(row["mean_acc_norm"])
            found.setdefault((row["method"], int(row["blocks_fewer"])), {})[float(row["value"])] = measured
    return found


def strength_table() -> str:
    rows = [
        [str(blocks), method, f"{value:g}", f"{perplexity:.2f}", f"{accuracy:.1f}"]
        for (method, blocks), values in sorted(strengths().items())
        for value, (perplexity, accuracy) in sorted(values.items())
    ]
    head = ["blocks fewer", "method", "strength", "perplexity, valid", "zero-shot, rows 500 to 999"]
    return markdown(head, rows)
