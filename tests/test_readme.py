"""What README and docs claim: their tables are those of the recorded rows, and their words agree with them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import bench_quality
import pytest
import zero_shot
from report import quality_tables, tables
from report.rows import last, newest, read
from specs import plain_spec

ROOT = Path(__file__).resolve().parent.parent

documents = pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
README = ROOT / "README.md"
QUALITY = ROOT / "docs" / "results" / "quality.md"


def words_of(document: Path) -> str:
    return " ".join(document.read_text(encoding="utf-8").split())


@documents
def test_tables_agree_with_the_rows(document: Path):
    text = document.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_every_table_stands_somewhere():
    text = "".join(document.read_text(encoding="utf-8") for document in tables.DOCUMENTS)
    for name in tables.TABLES:
        assert text.count(f"<!-- table {name} -->") == text.count(f"<!-- end {name} -->") == 1, name


def test_a_changed_number_is_noticed():
    text = QUALITY.read_text(encoding="utf-8")
    table = quality_tables.quality_table()
    number = re.search(r"\d+\.\d\d", table)[0]
    assert tables.filled(text.replace(number, "1.23")) != text.replace(number, "1.23")


def test_the_page_names_what_is_measured():
    """Windows, tasks and rows of the quality table are those of the benchmark."""
    text = words_of(QUALITY)
    assert f"the first {bench_quality.WINDOWS} windows of {bench_quality.SEQ_LEN} tokens" in text
    assert f"the first {zero_shot.LIMIT} rows of each" in text
    assert zero_shot.PAPER_TASKS == ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
    assert "PIQA, WinoGrande, HellaSwag, ARC-easy and ARC-challenge" in text


def test_repair_gains_less_on_other_texts():
    """The words: calibrated on other text, the gain in perplexity is about half."""
    text = words_of(QUALITY)
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


def test_quantising_beats_pruning_here():
    """The words: dense int4 is smaller and better than any pruned model in bf16."""
    assert "A dense model of 4 bits is smaller and better here than any pruned model in bf16" in words_of(README)
    rows = {variant: row for (variant,), row in newest("quantization", "variant").items()}
    size, perplexity = float(rows["int4"]["weight_mb"]), float(rows["int4"]["perplexity"])
    pruned = [r for r in quality_tables.quality_rows() if r["blocks_fewer"]]
    assert pruned
    assert all(r["perplexity"] > perplexity and 2e-6 * r["parameters"] > size for r in pruned)


def test_what_three_blocks_cost():
    """The words: 8 % of all parameters, about 3 points; at 9 blocks the perplexity has doubled."""
    text = words_of(README)
    assert "3 of 30 blocks are 8 % of all parameters here, and cost about 3 points of perplexity" in text
    assert "At 9 of 30 blocks fewer, perplexity has about doubled even with repair" in text
    rows = {(r["variant"], r["repair"], r["blocks_fewer"]): r for r in quality_tables.quality_rows()}
    dense, three = rows["dense", "none", 0], rows["shortgpt", "ridge", 3]
    assert round(100 * (1 - three["parameters"] / dense["parameters"])) == 8
    assert 2.5 < three["perplexity"] - dense["perplexity"] < 3.5
    nine = [r["perplexity"] for key, r in rows.items() if key[1:] == ("ridge", 9)]
    assert nine
    assert 1.8 < min(nine) / dense["perplexity"] < 2.5


def test_pruning_adds_to_four_bits():
    """The words: both add up. A pruned model of 4 bits decodes faster than the dense one of 4 bits, in the same run."""
    assert "and both add up" in words_of(README)
    rows = [r for r in read("cpu") if r["model"] == "smollm2-135m" and r["runtime"] == "ours"]
    speed = last(rows, "precision", "variant", "what")
    dense = float(speed["int4", "dense", "decode1@32"]["median"])
    assert float(speed["int4", "shortgpt 25%", "decode1@32"]["median"]) > 1.2 * dense


def test_a_pruned_model_keeps_no_cache_of_what_went():
    spec = plain_spec(4)
    fewer = dataclasses.replace(spec, sublayers=spec.sublayers[2:])
    assert fewer.kv_bytes_per_token(2) == 3 * spec.kv_bytes_per_token(2) // 4
