"""Tables of README.md and docs/ and their plot, made from the rows under benchmarks/results.

python benchmarks/tables.py           # rewrites the marked parts of all and results/quality.svg
python benchmarks/tables.py --check   # says whether all agree with the rows; exit status 1 if not
python benchmarks/tables.py --json    # the tables' rows
"""

from __future__ import annotations

import argparse
import json
import sys

from report import quality_tables
from report.rows import RESULTS, ROOT
from report.tables import DOCUMENTS, filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(quality_tables.quality_rows(), indent=2))
        return
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if not args.check:
            document.write_text(filled(text), encoding="utf-8")
        elif filled(text) != text:
            name = document.relative_to(ROOT)
            sys.exit(f"{name}: its tables do not agree with benchmarks/results; run python benchmarks/tables.py")
    if not args.check:
        quality_tables.plot(RESULTS / "quality.svg")


if __name__ == "__main__":
    main()
