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
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from reporting import evidence
from reporting.claimed import CLAIMS
from reporting.evidence import Found
from reporting.model import Check, Claim, Cpu, Exact, Gpu, Quality, Quantized
from tables import ROOT, markdown

_PRUNED = {2: 5.3, 3: 7.9, 6: 15.8, 9: 23.7}  # blocks fewer of SmolLM2's 30: per cent of its parameters
_MODELS = {"smollm2-135m": "SmolLM2-135M", "random-llama-1b": "random 1B Llama"}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one check says. found: newest last; true_size: of the claim's own model."""

    label: str
    unit: str  # x or %
    found: tuple[Found, ...]
    true_size: bool = False
    exact: bool = False

    @property
    def text(self) -> str:
        last = self.found[-1]
        unit = "x" if self.unit == "x" else "%"
        digits = 2 if unit == "x" else 1
        spread = "" if last.low is None else f" [{last.low:.{digits}f} .. {last.high:.{digits}f}]"
        text = f"{last.value:.{digits}f}{unit}{spread} {self.label}"
        if last.note:
            text += f" ({last.note})"
        return text + self._earlier(digits, unit) + (f"; out of date: {last.stale}" if last.stale else "")

    @property
    def short(self) -> str:
        """Without what the report says besides."""
        marks = [
            m for m, on in (("the run before disagrees", self.disputed), ("out of date", self.found[-1].stale)) if on
        ]
        plain = dataclasses.replace(self.found[-1], note="", stale="")
        text = dataclasses.replace(self, found=(plain,)).text
        return text + (f" ({', '.join(marks)})" if marks else "")

    @property
    def disputed(self) -> bool:
        """The run before says something else."""
        return len(self.found) > 1 and not self.found[-1].agrees(self.found[-2])

    def _earlier(self, digits: int, unit: str) -> str:
        """The run before, if any: whether a second run says the same."""
        if len(self.found) < 2:
            return ""
        last, before = self.found[-1], self.found[-2]
        verdict = "does not agree" if self.disputed else "agrees"
        code = "the same code" if last.commit == before.commit else "other code"
        return f"; the run before, {code}, {verdict}: {before.value:.{digits}f}{unit}"

    @property
    def rows(self) -> tuple[str, ...]:
        return self.found[-1].rows


def _answer(check: Check) -> Answer | None:
    """What the rows say; None where there are none."""
    found: list[Found] = []
    own, exact, unit = False, False, "x"
    match check:
        case Cpu():
            found = evidence.cpu_speedups(check.variant, check.case, check.model, check.precision)
            label = f"{_MODELS[check.model]} on a CPU, {check.variant}, {check.precision}, {check.case}"
        case Gpu():
            found = evidence.gpu_speedups(check.model, check.runtime, check.case, check.settings)
            own, label = True, f"{check.model} on a GPU, {check.runtime}, {check.case}"
            label += f", {check.subset}" if check.subset else ""
        case Quality():
            find = evidence.perplexity_ratio if check.metric == "perplexity" else evidence.zero_shot_kept
            one = find(check.variant, check.blocks, check.repair)
            found = [one] if one else []
            unit = "x" if check.metric == "perplexity" else "%"
            what = "of the dense perplexity" if unit == "x" else "of the dense accuracy"
            how = "as printed" if check.repair == "none" else "with our repair"
            label = f"{what}, SmolLM2-135M less {_PRUNED[check.blocks]}%, {how}"
        case Quantized():
            one = evidence.quantized_ratio(check.variant, check.base)
            found, label = [one] if one else [], f"of the {check.base} perplexity, SmolLM2-135M, {check.variant}"
        case Exact():
            unit, exact, label = check.unit, True, check.label
            found = [Found(check.value, None, None, (), "", "exact")]
    return Answer(label, unit, tuple(found), own, exact) if found else None


@dataclasses.dataclass(frozen=True)
class Result:
    claim: Claim
    answers: tuple[Answer, ...]

    @property
    def status(self) -> str:
        if any(a.true_size for a in self.answers):
            subset = any(isinstance(c, Gpu) and c.subset for c in self.claim.checks)
            return "measured on a part of the depth" if subset else "measured"
        if any(a.exact for a in self.answers):
            speed = any(isinstance(check, Gpu) for check in self.claim.checks)
            return "computed, speed not measured" if speed else "computed"
        return "smaller model only" if self.answers else "not measured"

    @property
    def why(self) -> str:
        """What is missing; empty for what is measured or exact."""
        return "" if self.status in ("measured", "computed") else f"It takes {self.claim.needs}."

    def to_json(self) -> dict[str, Any]:
        claim = {f.name: getattr(self.claim, f.name) for f in dataclasses.fields(Claim)}
        for name in ("checks", "floors"):
            del claim[name]
        floors = [{**dataclasses.asdict(f), "speedup": f.speedup} for f in self.claim.floors()]
        answers = [
            {"what": a.label, "unit": a.unit, "text": a.text, **dataclasses.asdict(a.found[-1])} for a in self.answers
        ]
        return {**claim, "floors": floors, "status": self.status, "why": self.why, "measured": answers}


def results() -> list[Result]:
    return [Result(c, tuple(a for check in c.checks if (a := _answer(check)) is not None)) for c in CLAIMS]


def readme_table() -> str:
    """The headlines: claimed, floor, what is measured on smaller models, what the true size takes."""
    lines = []
    for result in results():
        claim = result.claim
        if not claim.headline:
            continue
        here = "<br>".join(a.short for a in result.answers) or "nothing comparable"
        floors = "<br>".join(f"{f.speedup:.2f}x ({f.how})" for f in claim.floors())
        state = result.status + (f": it takes {claim.needs}" if result.why else "")
        lines.append([f"`{claim.name}`", claim_text(claim), floors, here, state])
    return markdown(("claim", "claimed", "floor", "measured here", "at the true size"), lines)


def claim_text(claim: Claim) -> str:
    return f"{claim.method}, {claim.model}, {claim.ratio}: {claim.what}: **{claim.claimed}**"


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
