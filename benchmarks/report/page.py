"""The report as one HTML page that needs nothing else: claims, plots, tables, and every recorded row."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Sequence

from report.claims import Result
from report.plots import Plot
from report.rows import RESULTS
from report.tables import TABLES

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #59636d; --line: #d6dbe0; --paper: #fff; --tint: #f3f5f7;
  --good: #23733f; --wait: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #a3adb7; --line: #3a424a; --paper: #15191d;
  --tint: #1e2429; --good: #6cc48a; --wait: #e0b25c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
p { max-width: 44rem; } a { color: inherit; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .82rem; line-height: 1.35; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th { background: var(--tint); white-space: nowrap; }
.raw td { white-space: nowrap; }
.summary td:first-child, .summary td:nth-child(4) { min-width: 15rem; }
.summary td:nth-child(2) { min-width: 9rem; }
.claims { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.claim { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; min-width: 0; font-size: .88rem; }
.claim h3 { margin: 0; } .claim p { margin: .2rem 0; } .claim dl { margin: .5rem 0; }
.claim dt { color: var(--soft); font-size: .78rem; margin-top: .4rem; } .claim dd { margin: 0; }
.state { font-weight: 600; color: var(--wait); } .state.done { color: var(--good); }
figure { margin: 1.5rem 0; max-width: 40rem; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .85rem; } summary { cursor: pointer; }
code, pre { font: .8rem/1.4 ui-monospace, monospace; }
pre { white-space: pre-wrap; background: var(--tint); padding: .5rem; border-radius: .3rem; margin: .3rem 0; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --tint: #f3f3f3;
  --good: #145c2c; --wait: #6b4500; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav, .raw { display: none; } .scroll { overflow: visible; }
  .claim, figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } figure { max-width: 15cm; } }
"""


def inline(text: str) -> str:
    """Escaped, with `code`, **bold**, <br> and no links."""
    safe = html.escape(text, quote=False).replace("&lt;br&gt;", "<br>")
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", safe)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{inline(c)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(row(line, "td") for line in lines)
    return f'<div class="scroll"><table><thead>{row(heads, "th")}</thead>\n<tbody>{body}</tbody></table></div>'


def from_markdown(text: str) -> str:
    """A table that tables.py made; a sentence where it has no rows."""
    if not text.startswith("|"):
        return f"<p>{inline(text)}</p>"
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return table(cells[0], cells[2:])


def summary(results: Sequence[Result]) -> str:
    """A line a claim; its card says the rest."""
    lines = []
    for result in results:
        claim = result.claim
        floors = " to ".join(f"{s:.2f}x" for s in sorted({f.speedup for f in claim.floors()}))
        here = "<br>".join(a.short for a in result.answers) or "nothing comparable"
        what = f"{claim.method}, {claim.model}, {claim.ratio}<br>{claim.what}"
        lines.append([what, claim.claimed, floors, here, result.status])
    heads = ("claim", "claimed", "bytes or operations", "measured here", "at the true size")
    return table(heads, lines).replace('class="scroll"', 'class="scroll summary"')


def claim_card(result: Result) -> str:
    claim = result.claim
    done = " done" if not result.why else ""
    parts = [
        f'<h3 id="claim-{html.escape(claim.name)}">{inline(claim.what[:1].upper() + claim.what[1:])}: '
        f"{inline(claim.claimed)}</h3>",
        f"<p>{inline(claim.method)}, {inline(claim.model)}, {inline(claim.ratio)}</p>",
        f'<p class="state{done}">{inline(result.status)}</p>',
        "<dl>",
    ]
    entries = [("floor: what fewer bytes or operations gain by themselves", [str(f) for f in claim.floors()])]
    entries += [("measured here", [f"{a.text} {_rows(a.rows)}" for a in result.answers])]
    entries += [("missing", [result.why] if result.why else [])]
    entries += [("source", [f"arXiv {claim.arxiv}, {claim.where}"])]
    for title, texts in entries:
        if texts:
            parts.append(f"<dt>{title}</dt>" + "".join(f"<dd>{inline(text)}</dd>" for text in texts))
    parts.append("</dl>")
    commands = [("here", claim.here), ("at the true size", claim.true_size)]
    shown = "".join(f"<p>{where}</p><pre>{html.escape(line)}</pre>" for where, line in commands if line)
    if shown:
        parts.append(f"<details><summary>commands: <code>{html.escape(claim.name)}</code></summary>{shown}</details>")
    return f'<article class="claim">{"".join(parts)}</article>'


def _rows(rows: Sequence[str]) -> str:
    return f"`{' '.join(rows)}`" if rows else ""


def figure(plot: Plot) -> str:
    return (
        f'<figure id="plot-{plot.name}">\n<h3>{html.escape(plot.title)}</h3>\n{plot.svg}\n'
        f"<figcaption>{html.escape(plot.note)}</figcaption></figure>"
    )


def raw(name: str) -> str:
    """Every row of a CSV file, folded; its first column is the line that other parts name."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        reader = csv.reader(file)
        heads = ["line", *next(reader)]
        lines = [[str(reader.line_num), *row] for row in reader]
    title = f"<summary>{html.escape(name)}.csv, {len(lines)} rows</summary>"
    return f'<details class="raw" id="rows-{html.escape(name)}">{title}{table(heads, lines)}</details>'


def page(results: Sequence[Result], plots: Sequence[Plot], joined: str) -> str:
    names = sorted(p.stem for p in RESULTS.glob("*.csv"))
    states: dict[str, int] = {}
    for result in results:
        states[result.status] = states.get(result.status, 0) + 1
    count = "; ".join(f"{number} {state}" for state, number in sorted(states.items(), key=lambda s: -s[1]))
    titles = {"decode": "Beside Transformers", "cpu": "Beside other runtimes", "quality": "Quality"}
    sections = [
        f"<h3>{html.escape(titles.get(name, name))}</h3>{from_markdown(make())}"
        for name, make in TABLES.items()
        if name != "claims"
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>depthprune_runtime: claimed, measured, floor</title><style>{STYLE}</style></head><body>",
            "<header><h1>Claimed, measured, floor</h1>",
            "<p>What the papers on ShortGPT, FinerCut and FlattenGPT claim, what the rows of this repository say, and "
            "the least that any runtime must read or compute. Every number comes from a recorded row or follows from "
            f"the shapes. Of {len(results)} claims: {html.escape(count)}.</p>",
            '<nav><a href="#claims">Claims</a><a href="#plots">Plots</a><a href="#tables">Tables</a>'
            '<a href="#rows">All rows</a></nav></header>',
            '<main><section id="claims"><h2>Claims</h2>',
            "<p>Speedups are pruned over dense in one run, with the range that the quartiles of both allow; quality is "
            "that of SmolLM2-135M-Instruct, and says little about large models.</p>",
            summary(results),
            "<h3>Each claim with its rows and commands</h3>",
            '<div class="claims">',
            *map(claim_card, results),
            '</div></section><section id="plots"><h2>Plots</h2>',
            *map(figure, plots),
            "<h3>Perplexity and measured latency of the same model</h3>",
            from_markdown(joined),
            '</section><section id="tables"><h2>Tables</h2>',
            *sections,
            '</section><section id="rows"><h2>All rows</h2>',
            "<p>Rows whose commit ends in + were measured with changes that no commit holds: no table, plot or claim "
            "uses them.</p>",
            *map(raw, names),
            "</section></main></body></html>",
            "",
        ]
    )
