"""What the READMEs claim: their tables are those of the recorded rows, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import bench_quality
import pytest
import zero_shot
from report import quality_tables, tables

ROOT = Path(__file__).resolve().parent.parent

documents = pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))


@documents
def test_tables_agree_with_the_rows(document: Path):
    text = document.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_every_table_stands_somewhere():
    text = "".join(document.read_text(encoding="utf-8") for document in tables.DOCUMENTS)
    for name in tables.TABLES:
        assert text.count(f"<!-- table {name} -->") == text.count(f"<!-- end {name} -->") == 1, name


def test_a_changed_number_is_noticed():
    text = tables.DOCUMENTS[0].read_text(encoding="utf-8")
    table = quality_tables.quality_table()
    number = re.search(r"\d+\.\d\d", table)[0]
    assert tables.filled(text.replace(number, "1.23")) != text.replace(number, "1.23")


def test_the_readme_names_what_is_measured():
    """Windows, tasks and rows of the quality table are those of the benchmark."""
    text = " ".join(tables.DOCUMENTS[0].read_text(encoding="utf-8").split())
    assert f"the first {bench_quality.WINDOWS} windows of {bench_quality.SEQ_LEN} tokens" in text
    assert f"the first {zero_shot.LIMIT} rows of each" in text
    assert zero_shot.PAPER_TASKS == ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
    assert "PIQA, WinoGrande, HellaSwag, ARC-easy and ARC-challenge" in text


def test_repair_gains_less_on_other_texts():
    """The words: calibrated on other text, the gain in perplexity is about half."""
    text = " ".join(tables.DOCUMENTS[0].read_text(encoding="utf-8").split())
    assert "lowers the same perplexity by about half as much" in text
    shares = []
    for texts in quality_tables.gains(3).values():
        gain = {
            name: float(pair["none"]["perplexity"]) - float(pair["ridge"]["perplexity"])
            for name, pair in texts.items()
            if {"none", "ridge"} <= set(pair)
        }
        shares += [gain[name] / gain["wikitext2"] for name in gain if name != "wikitext2" and "wikitext2" in gain]
    assert shares
    assert 0.3 < sum(shares) / len(shares) < 0.75


def headings(document: Path) -> set[str]:
    """Anchors of its headings, as they are made on the web."""
    found = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@documents
def test_links_lead_somewhere(document: Path):
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        place = document.parent / target if target else document
        assert target.startswith("http") or place.exists(), link
        if anchor and not target.startswith("http"):
            assert anchor in headings(place), link
