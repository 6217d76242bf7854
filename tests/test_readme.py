"""What the READMEs claim: their tables are those of the recorded rows, and their links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality_tables  # noqa: E402
import tables  # noqa: E402

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
