"""Claims, measurements and floors as Markdown: what benchmarks/results/report.md holds."""

from __future__ import annotations

from report.claim import NOT_TO_BE_HAD
from report.claims import Result, claim_text, results
from report.rows import last, markdown, newest, read


def joined_table() -> str:
    """Perplexity and decode rate where both were measured of the same model: so far the dense one, by precision."""
    scores = newest("quantization", "variant")
    rates = last([r for r in read("cpu") if r["model"] == "smollm2-135m"], *_CPU)
    lines = []
    for precision in ("bf16", "int8", "int4"):
        score, rate = scores.get((precision,)), rates.get((precision, "ours", "dense", "decode1@32"))
        if score is not None and rate is not None:
            speed = float(rate["median"])
            lines.append([f"dense, {precision}", f"{1e3 / speed:.2f} ms", f"{float(score['perplexity']):.2f}"])
    return markdown(("SmolLM2-135M", "a token at batch 1, context 32", "perplexity"), lines)


_CPU = ("precision", "runtime", "variant", "what")


def claims_table(found: list[Result]) -> str:
    lines = []
    for result in found:
        here = "<br>".join(f"{a.text} {' '.join(a.rows)}".strip() for a in result.answers) or "nothing comparable"
        floors = "<br>".join(map(str, result.claim.floors()))
        state = f"{result.status}. {result.why}" if result.why else result.status
        lines.append(
            [
                f"`{result.claim.name}`",
                claim_text(result.claim),
                f"arXiv {result.claim.arxiv}, {result.claim.where}",
                floors,
                here,
                state,
            ]
        )
    return markdown(("claim", "claimed", "source", "floor", "measured here, rows", "at the true size"), lines)


def commands(found: list[Result]) -> str:
    """How to reproduce each claim."""
    parts = []
    for result in found:
        claim = result.claim
        lines = [f"### {claim.name}", ""]
        for where, line in (("Here:", claim.here), ("At the true size:", claim.true_size)):
            lines += [where, "", f"    {line}", ""] if line else []
        if not claim.here and not claim.true_size:
            lines += [f"No command: it takes {claim.needs}.", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def report_markdown() -> str:
    found = results()
    return (
        "# Claimed, measured, floor\n\n"
        "Made by `make report` from the rows beside this file; what stands in a row of the table is reproduced by the\n"
        "command below of the same name, or by `python benchmarks/claims.py --measure NAME`.\n\n"
        f"{claims_table(found)}\n\nNot to be had, and so not claimed here: {'; '.join(NOT_TO_BE_HAD)}.\n\n"
        f"## Perplexity and measured latency of the same model\n\n{joined_table()}\n\n"
        f"## Commands\n\n{commands(found).rstrip()}\n"
    )
