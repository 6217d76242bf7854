"""What the README claims: its tables are those of the recorded rows, and its links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402


def test_tables_agree_with_the_rows():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_a_changed_number_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = tables.quality_table()
    number = re.search(r"\d+\.\d\d", table)[0]
    assert tables.filled(text.replace(number, "1.23")) != text.replace(number, "1.23")


def test_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
