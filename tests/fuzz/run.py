"""A campaign, or one mutant again.

    python tests/fuzz/run.py --mutants 100000 --workers 2 [--formats gguf,native] [--record] [--json FILE]
    python tests/fuzz/run.py --recorded
    python tests/fuzz/run.py --format gguf --seed 123 [--keep FOLDER]

The exit status is 1 if a mutant failed. --record appends a row of each format to benchmarks/results/fuzz.csv, and
--recorded adds the rows up. An interrupted campaign keeps what it has found and says with which --start to go on.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path = [
    str(ROOT / "tests"),
    str(ROOT / "tests" / "helpers"),
    str(ROOT / "benchmarks"),
    str(ROOT),
    *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent),
]

from fuzz.campaign import FORMATS, Bench, Result, schedule  # noqa: E402
from fuzz.verdicts import BAD, OUTCOMES  # noqa: E402

_SHOWN = 3  # mutants of one group of failures
_SHARED = 24  # mutants in one child
_BENCH: Bench | None = None


def _start() -> None:
    """A worker, forked from a process whose bench is ready."""
    assert _BENCH is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _BENCH.move()


def _some(jobs: list[tuple[str, int]]) -> list[Result]:
    assert _BENCH is not None
    return _BENCH.results(jobs)


def _table(results: dict[str, collections.Counter[str]]) -> list[str]:
    shown = [o for o in OUTCOMES if any(c[o] for c in results.values())]
    lines = ["  ".join([f"{'format':<12}", f"{'mutants':>8}", *(f"{o:>9}" for o in shown)])]
    for name, counts in results.items():
        lines.append("  ".join([f"{name:<12}", f"{counts.total():>8}", *(f"{counts[o]:>9}" for o in shown)]))
    return lines


def _run(jobs: list[tuple[str, int]], workers: int) -> Iterator[Result]:
    """Results in the order of `jobs`; SIGINT and SIGTERM end it early."""
    from tqdm import tqdm

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts = [jobs[i : i + _SHARED] for i in range(0, len(jobs), _SHARED)]
    bar = tqdm(total=len(jobs), mininterval=1)
    context = multiprocessing.get_context("fork")
    with bar, context.Pool(workers, _start) as pool, contextlib.suppress(KeyboardInterrupt):
        for results in pool.imap(_some, parts):
            yield from results
            bar.update(len(results))


def campaign(args: argparse.Namespace) -> int:
    """Run the mutants on `args.workers` processes; print the table and the failures by group."""
    global _BENCH  # noqa: PLW0603
    where = _environment()
    _BENCH = Bench()
    _BENCH.prepare()
    formats = args.formats.split(",") if args.formats else None
    jobs = list(schedule(args.mutants, args.start, formats))
    counts = {name: collections.Counter[str]() for name in FORMATS if formats is None or name in formats}
    groups: dict[tuple[str, str, str], list[Result]] = {}
    behind = []
    begin = time.monotonic()
    for result in _run(jobs, args.workers):
        counts[result.format][result.verdict.outcome] += 1
        if not result.verdict.good or args.all:
            key = (result.verdict.outcome, result.format, result.verdict.group)
            groups.setdefault(key, []).append(result)
        if result.behind:
            behind.append(result)
    _BENCH.close()
    seconds = time.monotonic() - begin
    _show_groups(groups)
    if behind:
        print(f"\n{len(behind)} failed behind others in one child, not alone:")
        print("\n".join(f"    --format {r.format} --seed {r.seed}: {r.behind[:300]}" for r in behind[: 3 * _SHOWN]))
    print()
    print("\n".join(_table(counts)))
    total = sum(c.total() for c in counts.values())
    each = 1000 * seconds * args.workers / max(1, total)
    print(f"{total} mutants in {seconds:.0f} s, {each:.1f} ms of a worker each")
    if total < len(jobs):
        print(f"interrupted: go on with --start {args.start + total} --mutants {len(jobs) - total}")
    if args.json:
        _write_json(Path(args.json), counts, groups, seconds)
    if args.record and total:
        columns = {"workers": args.workers, "ms_per_mutant": f"{each:.1f}", **where}
        _record(counts, args.start, total, columns)
    return 1 if total < len(jobs) or any(c[o] for c in counts.values() for o in BAD) else 0


def _show_groups(groups: dict[tuple[str, str, str], list[Result]]) -> None:
    for (outcome, name, group), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(found)} x {outcome} in {name}: {group}")
        for result in found[:_SHOWN]:
            print(f"    --format {result.format} --seed {result.seed}: {result.mutant}\n        {result.verdict.why}")


def _write_json(
    path: Path, counts: dict[str, collections.Counter[str]], groups: dict[Any, list[Result]], seconds: float
) -> None:
    failures = [
        {
            "outcome": o,
            "format": f,
            "group": g,
            "count": len(r),
            "seeds": [x.seed for x in r[:20]],
            "why": r[0].verdict.why,
        }
        for (o, f, g), r in groups.items()
    ]
    report = {"seconds": seconds, "counts": {n: dict(c) for n, c in counts.items()}, "failures": failures}
    path.write_text(json.dumps(report, indent=1) + "\n")


def _environment() -> dict[str, str]:
    """Where the rows come from, as it is before the first mutant."""
    from common import environment

    return environment()


def _record(counts: dict[str, collections.Counter[str]], start: int, total: int, columns: dict[str, Any]) -> None:
    """A row of each format. first_mutant and last_mutant: of the campaign, of all formats together."""
    from common import append_rows

    span = {"first_mutant": start, "last_mutant": start + total - 1}
    rows = [
        {"format": name, **span, "mutants": c.total(), **{o: c[o] for o in OUTCOMES}, **columns}
        for name, c in counts.items()
    ]
    print(f"recorded in {append_rows('fuzz', rows)}")


def recorded() -> int:
    """Add up the published rows of each commit."""
    from common import recorded_rows

    rows = recorded_rows("fuzz")
    for commit in dict.fromkeys(row["commit"] for row in rows):
        counts: dict[str, collections.Counter[str]] = {}
        spans: dict[str, list[tuple[int, int]]] = {}
        for row in (r for r in rows if r["commit"] == commit):
            counts.setdefault(row["format"], collections.Counter()).update({o: int(row[o]) for o in OUTCOMES})
            spans.setdefault(row["format"], []).append((int(row["first_mutant"]), int(row["last_mutant"])))
        print("\n".join([f"commit {commit}", *_table(counts)]))
        for name, found in spans.items():
            found.sort()
            if any(next_[0] <= last[1] for last, next_ in itertools.pairwise(found)):
                raise SystemExit(f"commit {commit}: mutants of {name} are counted twice: runs {found}")
        print(f"{sum(c.total() for c in counts.values())} mutants\n")
    return 0


def again(args: argparse.Namespace) -> int:
    """One mutant, with everything that its child said."""
    bench = Bench()
    bench.prepare()
    mutant = bench.mutant(args.format, args.seed)
    print(mutant)
    if mutant.payload is not None:
        print(f"payload: {mutant.payload!r:.2000}")
    if args.keep:
        folder = Path(args.keep)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in mutant.files.items():
            (folder / name).write_bytes(data)
        print(f"its files are in {folder}")
    report = bench.run(mutant)
    from fuzz.verdicts import judge

    verdict = judge(report, mutant, bench.original(mutant))
    print(f"{verdict.outcome}: {verdict.why}\n{verdict.trace}")
    print(f"{report.seconds:.2f} s, {report.grown >> 20} MiB; warnings {report.warnings!r:.600}")
    if args.verbose:
        print(f"printed {report.printed}\nvalue {report.value}\noriginal {bench.original(mutant).baseline}")
    bench.close()
    return 0 if verdict.good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=1000, metavar="N")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--formats", help="some of " + ", ".join(FORMATS))
    parser.add_argument("--start", type=int, default=0, metavar="N", help="number of the first mutant")
    parser.add_argument("--json", metavar="FILE", help="write counts and failures there")
    parser.add_argument("--record", action="store_true", help="append a row of each format to results/fuzz.csv")
    parser.add_argument("--recorded", action="store_true", help="add up the rows there, commit by commit")
    parser.add_argument("--all", action="store_true", help="show the groups of good outcomes, too")
    parser.add_argument("--format", choices=list(FORMATS), help="of one mutant to run again")
    parser.add_argument("--seed", type=int, help="of one mutant to run again")
    parser.add_argument("--keep", metavar="FOLDER", help="leave its files there")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    if (args.format is None) != (args.seed is None):
        parser.error("--format and --seed belong together")
    if args.recorded:
        return recorded()
    return campaign(args) if args.seed is None else again(args)


if __name__ == "__main__":
    sys.exit(main())
