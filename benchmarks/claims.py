"""The papers' claims beside what is measured here and the floor that no runtime goes below.

    python benchmarks/claims.py [--json]                       # every claim, from the rows under benchmarks/results
    python benchmarks/claims.py --measure NAME [--true-size]   # runs the command of that claim; it appends rows
    python benchmarks/claims.py --measure NAME --print         # only says what it would run

Speedups are ours pruned over ours dense within one run: the medians' ratio, and in brackets the range that the
quartiles of both allow. Where an earlier run has the same rows, it is said whether the two ranges overlap. Floors
follow from the shapes: every weight once and the keys and values of the context for a decode step, multiplications
and additions for a prompt. Quality is that of SmolLM2-135M-Instruct, the real weights there are: what a small model
loses says little about how much a large one does.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from report.claims import Result, claim_text, results
from report.paper_speed import CLAIMS
from report.rows import ROOT


def show(result: Result) -> str:
    claim = result.claim
    lines = [f"{claim.name}: {claim_text(claim)}".replace("**", ""), f"  source    arXiv {claim.arxiv}, {claim.where}"]
    lines += [f"  floor     {floor}" for floor in claim.floors()]
    for answer in result.answers:
        lines += [f"  here      {answer.text}"] + ([f"            {', '.join(answer.rows)}"] if answer.rows else [])
    lines += [f"  state     {result.status}"] + ([f"  missing   {result.why}"] if result.why else [])
    lines += [f"  command   {claim.here}"] if claim.here else []
    lines += [f"  true size {claim.true_size}"] if claim.true_size else []
    return "\n".join(lines)


def command(name: str, true_size: bool) -> str:
    """The shell command of a claim; SystemExit where there is none."""
    claim = next((c for c in CLAIMS if c.name == name), None)
    if claim is None:
        raise SystemExit(f"claims: no claim {name!r}; known are {', '.join(c.name for c in CLAIMS)}")
    found = claim.true_size if true_size else claim.here
    if not found:
        raise SystemExit(f"claims: {name}: no command does that; it takes {claim.needs}")
    return found


def run(line: str) -> int:
    """Runs `line` in the root with this interpreter and the commands installed beside it."""
    python = shlex.quote(sys.executable)
    line = f"{python}{line.removeprefix('python')}" if line.startswith("python ") else line
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # noqa: PTH120
    return subprocess.run(line, shell=True, cwd=ROOT, env={**os.environ, "PATH": path}, check=False).returncode


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", metavar="NAME", help="run the command of this claim")
    parser.add_argument("--true-size", action="store_true", help="the one for the claim's own model, most need a GPU")
    parser.add_argument("--print", action="store_true", help="with --measure: only print the command")
    args = parser.parse_args(argv)
    if args.measure:
        line = command(args.measure, args.true_size)
        print(line, file=sys.stdout if args.print else sys.stderr, flush=True)
        if not args.print:
            sys.exit(run(line))
    elif args.json:
        print(json.dumps([result.to_json() for result in results()], indent=2))
    else:
        print("\n\n".join(map(show, results())))


if __name__ == "__main__":
    main()
