"""What the rows say to every claim of the papers, and the README's table of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from report import measured
from report.claim import Check, Claim, Cpu, Exact, Gpu, Quality, Quantized
from report.measured import Found
from report.paper_speed import CLAIMS
from report.rows import markdown

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
            found = measured.cpu_speedups(check.variant, check.case, check.model, check.precision)
            label = f"{_MODELS[check.model]} on a CPU, {check.variant}, {check.precision}, {check.case}"
        case Gpu():
            found = measured.gpu_speedups(check.model, check.runtime, check.case, check.settings)
            own, label = True, f"{check.model} on a GPU, {check.runtime}, {check.case}"
            label += f", {check.subset}" if check.subset else ""
        case Quality():
            find = measured.perplexity_ratio if check.metric == "perplexity" else measured.zero_shot_kept
            one = find(check.variant, check.blocks, check.repair)
            found = [one] if one else []
            unit = "x" if check.metric == "perplexity" else "%"
            what = "of the dense perplexity" if unit == "x" else "of the dense accuracy"
            how = "as printed" if check.repair == "none" else "with our repair"
            label = f"{what}, SmolLM2-135M less {_PRUNED[check.blocks]}%, {how}"
        case Quantized():
            one = measured.quantized_ratio(check.variant, check.base)
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
