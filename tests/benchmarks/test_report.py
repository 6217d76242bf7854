"""The report: one page that needs nothing else, with every row in it, and Markdown that agrees with the rows."""

from __future__ import annotations

import csv
import html
import re
from html.parser import HTMLParser

import pytest
from report import quality_tables
from report import rows as recorded
from report.claims import results
from report.page import inline, page
from report.plots import PLOTS, Point, front
from report.report import joined_table, report_markdown

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Nesting, ids, links and what stands in tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.attributes.append((tag, found))
        self.ids += [found["id"]] if found.get("id") else []
        self.links += [v for k, v in attrs if k.split(":")[-1] in ("href", "src", "action", "data") and v]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def text() -> str:
    pytest.importorskip("matplotlib")
    plots = [plot for make in PLOTS if (plot := make()) is not None]
    return page(results(), plots, joined_table())


@pytest.fixture(scope="module")
def parsed(text: str) -> Page:
    return Page(text)


def test_the_page_is_well_formed(parsed: Page) -> None:
    assert parsed.open == []
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {"viewport"} == {a.get("name") for tag, a in parsed.attributes if tag == "meta" and "name" in a}
    assert dict(parsed.attributes)["html"]["lang"] == "en"


def test_it_needs_nothing_else(text: str, parsed: Page) -> None:
    assert parsed.links and all(link.startswith("#") for link in parsed.links)
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not re.search(r"url\((?!#)|@import|https?://", text)


def test_plots_have_content_and_say_what_they_show(text: str, parsed: Page) -> None:
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == len(PLOTS)
    for svg in drawn:
        assert len(re.findall(r"<(path|use)\b", svg)) > 20
        assert svg.count("<text") > 5
    for tag, attributes in parsed.attributes:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"] or "") > 30


def test_every_recorded_row_is_there(parsed: Page) -> None:
    shown = {tuple(row) for row in parsed.rows}
    for path in recorded.RESULTS.glob("*.csv"):
        with path.open(newline="") as file:
            reader = csv.reader(file)
            next(reader)
            for row in reader:
                assert (str(reader.line_num), *row) in shown, f"{path.name}:{reader.line_num}"


def test_every_claim_and_table_is_there(text: str, parsed: Page) -> None:
    for result in results():
        assert f"claim-{result.claim.name}" in parsed.ids
        for line in (result.claim.here, result.claim.true_size):
            assert html.escape(line) in text
    numbers = {cell for row in parsed.rows for cell in row}
    for line in quality_tables.quality_table().splitlines()[2:]:
        assert line.split("|")[5].strip().strip("*") in numbers


def test_the_markdown_agrees_with_the_rows() -> None:
    stored = (recorded.RESULTS / "report.md").read_text(encoding="utf-8")
    assert report_markdown() == stored, "run make report"
    assert all(f"### {r.claim.name}" in stored for r in results())


def test_cells_are_escaped() -> None:
    assert inline("a < b & `x<y` **c**<br>d") == "a &lt; b &amp; <code>x&lt;y</code> <b>c</b><br>d"


def test_the_front_is_what_nothing_beats() -> None:
    points = [
        Point(1, 9, "a", ""),
        Point(2, 5, "b", ""),
        Point(2, 7, "c", ""),
        Point(3, 6, "d", ""),
        Point(4, 4, "e", ""),
    ]
    assert [p.label for p in front(points)] == ["a", "b", "e"]
