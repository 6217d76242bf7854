"""Two files of `pytest benchmarks/ --benchmark-json FILE`, benchmark by benchmark.

    python benchmarks/compare.py BEFORE.json AFTER.json [--fail-above 1.2] [--json]

Ratio of the medians, after over before, beside the spread: the range that the quartiles of both files allow. Only
where that range leaves out 1 is anything called faster or slower. Nothing fails on a clock unless --fail-above says so,
and then only where the whole range lies above it: exit status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compared:
    name: str
    before_us: float
    after_us: float
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return "slower"
        return "faster" if self.high < 1 else "the same within the spread"


def load(path: Path) -> dict[str, dict[str, float]]:
    """Statistics by name; SystemExit where the file is not what pytest-benchmark writes."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        stats = {one["name"]: {k: float(one["stats"][k]) for k in ("q1", "median", "q3")} for one in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"compare: {path}: expected a file of --benchmark-json ({error!r})") from error
    return stats


def compare(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> list[Compared]:
    """What both files have, in the order of the second."""
    return [
        Compared(
            name,
            1e6 * before[name]["median"],
            1e6 * new["median"],
            new["median"] / before[name]["median"],
            new["q1"] / before[name]["q3"],
            new["q3"] / before[name]["q1"],
        )
        for name, new in after.items()
        if name in before
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--fail-above", type=float, metavar="RATIO")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    before, after = load(args.before), load(args.after)
    rows = compare(before, after)
    if args.json:
        print(json.dumps([{**asdict(r), "verdict": r.verdict} for r in rows], indent=2))
    else:
        for row in rows:
            print(
                f"{row.name:<48}{row.before_us:>11.2f} us {row.after_us:>11.2f} us {row.ratio:>6.2f}x "
                f"[{row.low:.2f} .. {row.high:.2f}]  {row.verdict}"
            )
    for only, path in ((set(before) - set(after), args.before), (set(after) - set(before), args.after)):
        if only:
            print(f"only in {path}: {', '.join(sorted(only))}", file=sys.stderr)
    if args.fail_above is not None and any(r.low > args.fail_above for r in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
