"""What a child's report says about the package."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from fuzz.mutation import Mutant
from fuzz.originals import Original
from fuzz.sandbox import Report
from fuzz.uses import Observation

GOOD = ("ok", "refused", "warned", "meant")
BAD = ("changed", "traceback", "signal", "hang", "memory", "noise", "vague", "broken")
OUTCOMES = (*GOOD, *BAD)
_MOST_CHARACTERS = 1000
_ASKED = "blocks: "  # the argument of the jobs of `uses`, where it is more than a mutant has
_FULL = "(max_waiting)"  # that of its engine, which the mutant's n overfills
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Verdict:
    """outcome: one of OUTCOMES; why: for people; group: equal for verdicts that one defect explains."""

    outcome: str
    why: str = ""
    group: str = ""
    trace: str = ""

    @property
    def good(self) -> bool:
        return self.outcome in GOOD


def _shape(message: str) -> str:
    """A message without what differs from mutant to mutant."""
    short = re.sub(r"/\S+", "PATH", message)
    short = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "X", short)
    return re.sub(r"-?\d[\d,.e+]*", "N", short)[:90]


def noise(text: str) -> str | None:
    """What is wrong with `text` for a terminal, None if nothing is."""
    found = _UNPRINTABLE.search(text)
    return None if found is None else f"prints {found[0]!r}"


def _bad_message(message: str, mutant: Mutant) -> Verdict | None:
    """A refusal that is not one clean line, or does not say what it is about."""
    shape = _shape(message)
    if "\n" in message or "\r" in message:
        return Verdict("noise", f"several lines: {message!r:.200}", f"several lines: {shape}")
    if len(message) >= _MOST_CHARACTERS:
        return Verdict("noise", f"{len(message)} characters: {message!r:.200}", f"too long: {shape}")
    if (wrong := noise(message)) is not None:
        return Verdict("noise", f"{wrong}: {message!r:.200}", f"escapes: {shape}")
    if message.startswith(_ASKED) or _FULL in message:
        return None
    words = set().union(*(m.names for m in mutant.mutations))
    words |= {*mutant.files, mutant.target, "model", "prompt", "messages", "made", "ids"}
    if not any(w.lower() in message.lower() if len(w) > 1 else message.startswith(f"{w}:") for w in words):
        return Verdict("vague", f"names neither file nor field: {message!r:.200}", f"vague: {shape}")
    return None


def _failed(report: Report) -> Verdict:
    """A child that did not come to its end."""
    frames = re.findall(r'File "[^"]*/(depthprune_runtime/[^"]*)", line (\d+)', report.printed)
    place = ":".join(frames[0]) if frames else "unknown place"
    if report.error is not None:
        kind, message, frame, trace = report.error
        outcome = "memory" if report.end == "memory" else "traceback"
        return Verdict(outcome, f"{kind}: {message:.200} at {frame}", f"{kind} at {frame}: {_shape(message)}", trace)
    if report.end == "memory":
        return Verdict(
            "memory", f"{report.grown >> 20} MiB more than the parent", f"at {place}", report.printed[-1500:]
        )
    if report.end == "hang":
        return Verdict(
            "hang", f"no end after {report.seconds:.0f} s, in {place}", f"in {place}", report.printed[-1500:]
        )
    name = signal.Signals(report.signal).name if report.signal > 0 else f"exit {-report.signal}"
    return Verdict("signal", f"{name} in {place}", f"{name} in {place}", report.printed[-1500:])


def _warned(report: Report, mutant: Mutant, differing: list[str]) -> bool:
    """Whether a warning names what was changed."""
    words = set().union(*(m.names for m in mutant.mutations))
    parts = {p for w in words for p in (w, *w.split("."))} - {"", "weight", "model", "0", "1", "2"}
    return any(part.lower() in line.lower() for line in report.warnings for part in parts)


def judge(report: Report, mutant: Mutant, original: Original) -> Verdict:
    """The verdict on one mutant."""
    if report.end != "done":
        return _failed(report)
    seen: Observation = report.value
    for text in (*seen.shown, *report.warnings, report.printed):
        if (wrong := noise(text)) is not None:
            place = noise(text) and text[max(0, _UNPRINTABLE.search(text).start() - 60) :][:120]  # type: ignore[union-attr]
            return Verdict("noise", f"{wrong}: ...{place!r}", f"{wrong} in output: {_shape(place)}")
    if seen.complaints:
        return Verdict("broken", seen.complaints[0][:300], _shape(seen.complaints[0]))
    if seen.refused is not None:
        stage, message = seen.refused
        return _bad_message(message, mutant) or Verdict("refused", f"{stage}: {message}", f"{stage}: {_shape(message)}")
    expected: Observation | None = original.baseline
    if expected is None:
        return Verdict("ok")
    differing = [k for k in expected.results | seen.results if expected.results.get(k) != seen.results.get(k)]
    if mutant.format == "requests":
        differing = [k for k in differing if k in seen.results]
    elif not mutant.chats:
        differing = [k for k in differing if k != "chat"]
    if not differing:
        return Verdict("ok")
    if mutant.meant:
        return Verdict("meant", f"other {', '.join(differing)}")
    if _warned(report, mutant, differing):
        return Verdict("warned", report.warnings[0][:200])
    last = mutant.mutations[-1]
    key = ".".join(k for k in last.path if isinstance(k, str))[:60]
    what = ", ".join(differing)
    return Verdict("changed", f"other {what}, without a word", f"{last.kind} of {last.document} {key}: {what}")
