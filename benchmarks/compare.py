"""Two files of `pytest benchmarks/ --benchmark-json FILE`, benchmark by benchmark.

    python benchmarks/compare.py BEFORE.json AFTER.json [--fail-above 1.2] [--json]

Ratio of the medians over all takes, after over before, beside the spread: the range from the lowest quartile of any
take to the highest. Only where that range leaves out 1, and what torch's own `test_control` differs by, is anything
called faster or slower. Nothing fails on a clock unless --fail-above says so, and then only where something is slower
and its whole range lies above it: exit status 1.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CONTROL = "test_control"
Range = tuple[float, float]


@dataclass(frozen=True)
class Timed:
    """Seconds over all takes of one benchmark."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Compared:
    """machine: what the machine alone may have changed, as a range of ratios with 1 in it."""

    name: str
    before_us: float
    after_us: float
    ratio: float
    low: float
    high: float
    machine: Range

    @property
    def verdict(self) -> str:
        if self.low > self.machine[1]:
            return "slower"
        return "faster" if self.high < self.machine[0] else "the same within the spread"


def load(path: Path) -> dict[str, Timed]:
    """By name without the take; SystemExit where the file is not what pytest-benchmark writes."""
    takes: dict[str, list[tuple[float, float, float]]] = {}
    try:
        for one in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
            name = re.sub(r"-?take\d+", "", one["name"]).replace("[-", "[")
            stats = one["stats"]
            takes.setdefault(name, []).append((float(stats["q1"]), float(stats["median"]), float(stats["q3"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"compare: {path}: expected a file of --benchmark-json ({error!r})") from error
    return {
        name: Timed(min(t[0] for t in found), statistics.median(t[1] for t in found), max(t[2] for t in found))
        for name, found in takes.items()
    }


def machine(before: Mapping[str, Timed], after: Mapping[str, Timed]) -> Range:
    """Least and greatest ratio of the controls' medians, and 1."""
    ratios = [new.median / before[name].median for name, new in after.items() if CONTROL in name and name in before]
    return min([1.0, *ratios]), max([1.0, *ratios])


def compare(before: Mapping[str, Timed], after: Mapping[str, Timed]) -> list[Compared]:
    """What both files have, in the order of the second."""
    drift = machine(before, after)
    rows = []
    for name, new in after.items():
        if name in before:
            old = before[name]
            ratios = (new.median / old.median, new.low / old.high, new.high / old.low)
            rows.append(Compared(name, 1e6 * old.median, 1e6 * new.median, *ratios, drift))
    return rows


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
                f"{row.name:<40}{row.before_us:>11.2f} us {row.after_us:>11.2f} us {row.ratio:>6.2f}x "
                f"[{row.low:.2f} .. {row.high:.2f}]  {row.verdict}"
            )
        print("the machine alone: {:.2f}x to {:.2f}x".format(*machine(before, after)))
    for only, path in ((set(before) - set(after), args.before), (set(after) - set(before), args.after)):
        if only:
            print(f"only in {path}: {', '.join(sorted(only))}", file=sys.stderr)
    slower = [r for r in rows if r.verdict == "slower" and CONTROL not in r.name]
    if args.fail_above is not None and any(r.low > args.fail_above for r in slower):
        sys.exit(1)


if __name__ == "__main__":
    main()
