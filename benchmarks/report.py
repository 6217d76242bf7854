"""All recorded rows as one HTML page, and claims, measurements and floors as Markdown.

    python benchmarks/report.py [--html build/report.html] [--check]

The page needs no network and no other file; it is as large as its rows and is not kept in git. The Markdown is:
benchmarks/results/report.md. --check says whether that agrees with the rows; exit status 1 if not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tables
from claims import Result, claim_text, results
from reporting.model import NOT_TO_BE_HAD
from reporting.page import page
from reporting.plots import PLOTS

MARKDOWN = tables.RESULTS / "report.md"


def joined_table() -> str:
    """Perplexity and decode rate where both were measured of the same model: so far the dense one, by precision."""
    scores = tables.newest("quantization", "variant")
    rates = tables.last([r for r in tables.read("cpu") if r["model"] == "smollm2-135m"], *_CPU)
    lines = []
    for precision in ("bf16", "int8", "int4"):
        score, rate = scores.get((precision,)), rates.get((precision, "ours", "dense", "decode1@32"))
        if score is not None and rate is not None:
            speed = float(rate["median"])
            lines.append([f"dense, {precision}", f"{1e3 / speed:.2f} ms", f"{float(score['perplexity']):.2f}"])
    return tables.markdown(("SmolLM2-135M", "a token at batch 1, context 32", "perplexity"), lines)


_CPU = ("precision", "runtime", "variant", "what")


def claims_table(found: list[Result]) -> str:
    lines = []
    for result in found:
        here = "<br>".join(f"{a.text} {' '.join(a.rows)}".strip() for a in result.answers) or "nothing comparable"
        floors = "<br>".join(map(str, result.claim.floors()))
        state = f"{result.status}. {result.why}" if result.why else result.status
        lines.append(
            [
                f"`{result.claim.name}`",
                claim_text(result.claim),
                f"arXiv {result.claim.arxiv}, {result.claim.where}",
                floors,
                here,
                state,
            ]
        )
    return tables.markdown(("claim", "claimed", "source", "floor", "measured here, rows", "at the true size"), lines)


def commands(found: list[Result]) -> str:
    """How to reproduce each claim."""
    parts = []
    for result in found:
        claim = result.claim
        lines = [f"### {claim.name}", ""]
        for where, line in (("Here:", claim.here), ("At the true size:", claim.true_size)):
            lines += [where, "", f"    {line}", ""] if line else []
        if not claim.here and not claim.true_size:
            lines += [f"No command: it takes {claim.needs}.", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def report_markdown() -> str:
    found = results()
    return (
        "# Claimed, measured, floor\n\n"
        "Made by `make report` from the rows beside this file; what stands in a row of the table is reproduced by the\n"
        "command below of the same name, or by `python benchmarks/claims.py --measure NAME`.\n\n"
        f"{claims_table(found)}\n\nNot to be had, and so not claimed here: {'; '.join(NOT_TO_BE_HAD)}.\n\n"
        f"## Perplexity and measured latency of the same model\n\n{joined_table()}\n\n"
        f"## Commands\n\n{commands(found).rstrip()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=Path, default=tables.ROOT / "build" / "report.html")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = report_markdown()
    if args.check:
        if not MARKDOWN.exists() or MARKDOWN.read_text(encoding="utf-8") != text:
            sys.exit("benchmarks/results/report.md does not agree with the rows; run make report")
        return
    MARKDOWN.write_text(text, encoding="utf-8")
    plots = [plot for make in PLOTS if (plot := make()) is not None]
    args.html.parent.mkdir(parents=True, exist_ok=True)
    args.html.write_text(page(results(), plots, joined_table()), encoding="utf-8")
    print(f"{MARKDOWN.relative_to(tables.ROOT)} and {args.html} ({args.html.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
