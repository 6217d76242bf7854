"""A campaign, or one mutant again.

    python tests/fuzz/run.py --mutants 100000 --workers 2 [--formats gguf,native] [--record] [--json FILE]
    python tests/fuzz/run.py --format gguf --seed 123 [--keep FOLDER]

The exit status is 1 if a mutant failed. --record appends the table to benchmarks/results/fuzz.csv.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path = [
    str(ROOT / "tests"),
    str(ROOT),
    *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent),
]

from fuzz.campaign import FORMATS, Bench, Result, schedule  # noqa: E402
from fuzz.verdicts import BAD, OUTCOMES  # noqa: E402

_SHOWN = 3  # mutants of one group of failures
_BENCH: Bench | None = None


def _start(originals: Any) -> None:
    """A worker: its own folder, the originals of the parent."""
    global _BENCH  # noqa: PLW0603
    _BENCH = Bench(originals)


def _one(job: tuple[str, int]) -> Result:
    assert _BENCH is not None
    return _BENCH.result(*job)


def _table(results: dict[str, collections.Counter[str]]) -> list[str]:
    shown = [o for o in OUTCOMES if any(c[o] for c in results.values())]
    lines = ["  ".join([f"{'format':<12}", f"{'mutants':>8}", *(f"{o:>9}" for o in shown)])]
    for name, counts in results.items():
        lines.append("  ".join([f"{name:<12}", f"{counts.total():>8}", *(f"{counts[o]:>9}" for o in shown)]))
    return lines


def campaign(args: argparse.Namespace) -> int:
    """Run the mutants on `args.workers` processes; print the table and the failures by group."""
    from tqdm import tqdm

    bench = Bench()
    bench.prepare()
    formats = args.formats.split(",") if args.formats else None
    jobs = list(schedule(args.mutants, args.start, formats))
    counts = {name: collections.Counter[str]() for name in FORMATS if formats is None or name in formats}
    groups: dict[tuple[str, str, str], list[Result]] = {}
    begin = time.monotonic()
    context = multiprocessing.get_context("fork")
    with context.Pool(args.workers, _start, (bench.originals,)) as pool, contextlib.suppress(KeyboardInterrupt):
        for result in tqdm(pool.imap_unordered(_one, jobs, 8), total=len(jobs), mininterval=1):
            counts[result.format][result.verdict.outcome] += 1
            if not result.verdict.good or args.all:
                key = (result.verdict.outcome, result.format, result.verdict.group)
                groups.setdefault(key, []).append(result)
    bench.close()
    seconds = time.monotonic() - begin
    for (outcome, name, group), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(found)} x {outcome} in {name}: {group}")
        for result in found[:_SHOWN]:
            print(f"    --format {result.format} --seed {result.seed}: {result.mutant}\n        {result.verdict.why}")
    print()
    print("\n".join(_table(counts)))
    total = sum(c.total() for c in counts.values())  # fewer than asked for after an interrupt
    each = 1000 * seconds * args.workers / max(1, total)
    print(f"{total} mutants in {seconds:.0f} s, {each:.1f} ms of a worker each")
    if args.json:
        report = {
            "seconds": seconds,
            "counts": {n: dict(c) for n, c in counts.items()},
            "failures": [
                {
                    "outcome": o,
                    "format": f,
                    "group": g,
                    "count": len(r),
                    "seeds": [x.seed for x in r[:20]],
                    "why": r[0].verdict.why,
                }
                for (o, f, g), r in groups.items()
            ],
        }
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.record:
        _record(counts, seconds, args)
    return 1 if any(c[o] for c in counts.values() for o in BAD) else 0


def _record(counts: dict[str, collections.Counter[str]], seconds: float, args: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import append_rows, environment

    where = environment()
    total = sum(c.total() for c in counts.values())
    rows = [
        {
            "format": name,
            "first_seed": args.start,
            "mutants": c.total(),
            **{o: c[o] for o in OUTCOMES},
            "ms_per_mutant": f"{1000 * seconds * args.workers / total:.1f}",
            "workers": args.workers,
            **where,
        }
        for name, c in counts.items()
    ]
    print(f"recorded in {append_rows('fuzz', rows)}")


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
    parser.add_argument("--start", type=int, default=0, metavar="SEED", help="first seed of every format")
    parser.add_argument("--json", metavar="FILE", help="write counts and failures there")
    parser.add_argument("--record", action="store_true", help="append a row of each format to results/fuzz.csv")
    parser.add_argument("--all", action="store_true", help="show the groups of good outcomes, too")
    parser.add_argument("--format", choices=list(FORMATS), help="of one mutant to run again")
    parser.add_argument("--seed", type=int, help="of one mutant to run again")
    parser.add_argument("--keep", metavar="FOLDER", help="leave its files there")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    if (args.format is None) != (args.seed is None):
        parser.error("--format and --seed belong together")
    return campaign(args) if args.seed is None else again(args)


if __name__ == "__main__":
    sys.exit(main())
