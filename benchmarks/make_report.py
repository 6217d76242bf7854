"""All recorded rows as one HTML page, and claims, measurements and floors as Markdown.

    python benchmarks/make_report.py [--html build/report.html] [--check]

The page needs no network and no other file; it is as large as its rows and is not kept in git. The Markdown is:
benchmarks/results/report.md. --check says whether that agrees with the rows; exit status 1 if not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from report.claims import results
from report.page import page
from report.plots import PLOTS
from report.report import joined_table, report_markdown
from report.rows import RESULTS, ROOT

MARKDOWN = RESULTS / "report.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=Path, default=ROOT / "build" / "report.html")
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
    print(f"{MARKDOWN.relative_to(ROOT)} and {args.html} ({args.html.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
