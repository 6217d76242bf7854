"""The table of claims: complete, every number from a row or exact, every command one that its tool takes."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
from pathlib import Path

import claims
import public_models
import pytest
from report import measured
from report import rows as recorded
from report.claim import NOT_TO_BE_HAD, Exact
from report.claims import Answer, readme_table, results
from report.measured import Found

ROOT = Path(__file__).resolve().parents[2]

RESULTS = results()
NAMES = [r.claim.name for r in RESULTS]


def test_names_are_unique_and_the_well_known_claims_are_there():
    assert len(set(NAMES)) == len(NAMES) > 30
    values = {r.claim.name: r.claim.value for r in RESULTS}
    assert values["flattengpt-70b-throughput"] == 1.27
    assert values["flattengpt-70b-latency"] == 1.26
    assert values["shortgpt-gptq-throughput"] == 1.19
    assert values["finercut-70b-size"] == 34
    assert values["flattengpt-llama-2-7b-20-recovered"] == 66.24


def test_claims_name_their_source():
    """What the papers print: model, table, numbers before and after."""
    found = {r.claim.name: r.claim for r in RESULTS}
    printed = {
        "shortgpt-parameters": ("Llama-2-13B", "sections 1 and 7", ""),
        "shortgpt-compute": ("Llama-2-13B", "sections 1 and 7", ""),
        "shortgpt-13b-mmlu": ("Llama-2-13B", "sections 1 and 7", "dense 55.0"),
        "shortgpt-gptq-throughput": ("Llama-2-7B", "Table 4", "4331.23 to 5146.99"),
        "shortgpt-mamba": ("Mamba-2.8B", "Table 3", "dense 41.12"),
        "shortgpt-rwkv": ("RWKV-v5-7B", "Table 3", "dense 50.37"),
        "shortgpt-baichuan2-13b-24.7-13-tasks": ("Baichuan2-13B", "Table 2", "dense 62.31: 87.35% kept"),
        "shortgpt-post-training": ("not recorded", "Table 6", "41.22"),
        "shortgpt-llama-2-13b-21.93-latency": ("Llama-2-13B", "appendix F", "7285.73 to 4111.65 ms"),
        "flattengpt-llama-2-7b-20-recovered": ("Llama-2-7B", "recovery", "from 63.83"),
        "finercut-8b-kept": ("Llama-3-8B", "tasks from its code", "nine tasks"),
    }
    for name, (model, where, note) in printed.items():
        claim = found[name]
        assert claim.model == model, name
        assert where in claim.where, name
        assert note in claim.note, name
    for claim in found.values():  # nothing is promised for a batch that nobody gave
        assert "batch not given" not in claim.note or not claim.floors(), claim.name


def test_shares_that_are_kept_follow_from_the_numbers():
    """Per cent kept and speedups, from the two numbers printed beside them."""
    kept = 0
    for claim in (r.claim for r in RESULTS):
        both = re.search(r"dense ([0-9.]+)[^:]*: ([0-9.]+)% kept", claim.note)
        if both:
            kept += 1
            assert 100 * claim.value / float(both[1]) == pytest.approx(float(both[2]), abs=0.06), claim.name
        both = re.search(r"([0-9.]+) to ([0-9.]+) (ms|tokens/s)", claim.note)
        if both:
            slow, fast = sorted((float(both[1]), float(both[2])))
            assert fast / slow == pytest.approx(claim.value, abs=0.006), claim.name
    assert kept > 10


def test_blocks_at_the_true_size_are_the_share_that_was_claimed():
    """The fewest that reach it, by the shapes: 8 of Qwen1.5-7B's 32 blocks are 20.97 %, 7 are 18.35 %."""
    checked = set()
    for claim in (r.claim for r in RESULTS):
        blocks = re.search(r"--blocks (\d+)", claim.true_size)
        percent = re.fullmatch(r"([0-9.]+)%", claim.ratio)
        if claim.model.lower() in public_models.SPECS and blocks and percent:
            dense = public_models.SPECS[claim.model.lower()]
            share = 1 - public_models.shortened(dense, int(blocks[1])).num_parameters() / dense.num_parameters()
            assert 100 * share == pytest.approx(float(percent[1]), abs=0.5), claim.name
            checked.add(claim.model)
    assert checked == {"Llama-2-7B", "Llama-2-13B", "Qwen1.5-7B"}


def test_rows_of_an_uncommitted_tree_answer_no_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "RESULTS", tmp_path)
    store(tmp_path, [row("dense", "a", 10), row("flattengpt 20%", "a", 12)])
    assert len(measured.cpu_speedups("flattengpt 20%", "decode8", "smollm2-135m", "bf16")) == 1
    store(tmp_path, [row("dense", "a+", 10), row("flattengpt 20%", "a+", 12)])
    assert measured.cpu_speedups("flattengpt 20%", "decode8", "smollm2-135m", "bf16") == []


def test_what_cannot_be_had_is_said():
    from report.report import report_markdown

    text = report_markdown()
    for words in NOT_TO_BE_HAD:
        assert words in text


@pytest.mark.parametrize("result", RESULTS, ids=NAMES)
def test_every_claim_is_measured_or_says_what_it_would_take(result):
    claim = result.claim
    assert claim.needs and claim.where and claim.arxiv
    assert result.status in ("measured", "computed") or result.why
    assert claim.here or not result.answers
    for answer in result.answers:
        assert answer.exact or answer.rows
        assert answer.found[-1].value > 0


@pytest.mark.parametrize("result", RESULTS, ids=NAMES)
def test_rows_are_there(result):
    for answer in result.answers:
        for name in answer.rows:
            file, line = name.split(":")
            with (recorded.RESULTS / file).open(newline="") as stored:
                reader = csv.DictReader(stored)
                assert any(reader.line_num == int(line) and row["commit"] for row in reader)


def test_speedups_are_the_medians_of_one_run():
    for result in RESULTS:
        for answer in result.answers:
            if answer.exact or not answer.rows[0].startswith("cpu"):
                continue
            rows = {r[measured.WHERE]: r for name in measured.CPU for r in measured.read(name)}
            pruned, dense = (rows[name] for name in answer.rows)
            assert dense["variant"] == "dense" != pruned["variant"]
            for key in ("precision", "what", "model", "commit", "command", "runtime"):
                assert pruned[key] == dense[key]
            assert answer.found[-1].value == pytest.approx(float(pruned["median"]) / float(dense["median"]))


def test_floors_of_70b():
    """138 GB of weights but the input embedding; a fifth of the blocks gives 1.25x, 1.27x takes 17 of them."""
    claim = next(r.claim for r in RESULTS if r.claim.name == "flattengpt-70b-throughput")
    sixteen, seventeen = claim.floors()
    dense = public_models.SPECS["llama-2-70b"]
    assert dense.num_parameters() == 68_976_648_192  # as published
    assert sixteen.before * 1e9 == dense.bytes_per_token(2) + 64 * 128 * dense.kv_bytes_per_token(2)
    assert sixteen.speedup == pytest.approx(1.249, abs=1e-3)
    assert seventeen.speedup == pytest.approx(1.269, abs=1e-3)


def test_shapes_of_public_models():
    published = {"llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "qwen1.5-7b": 7_721_324_544}
    published |= {"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "smollm2-135m": 134_515_008}
    for name, size in published.items():
        assert public_models.SPECS[name].num_parameters() == size, name
    less = public_models.shortened(public_models.SPECS["llama-3-70b"], attentions=34)
    assert (len(less.attention_sublayers()), len(less.ffn_sublayers())) == (46, 80)
    assert less.whole_blocks() is None


def test_exact_numbers_need_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "RESULTS", tmp_path)
    empty = results()
    assert all(a.exact for r in empty for a in r.answers)
    assert {r.claim.name for r in empty if r.answers} == {
        r.claim.name for r in RESULTS if any(isinstance(c, Exact) for c in r.claim.checks)
    }
    assert "nothing comparable" in readme_table()


def row(variant: str, commit: str, median: float, spread: float = 0.1) -> dict[str, str]:
    stored = {"model": "smollm2-135m", "precision": "bf16", "runtime": "ours", "variant": variant, "what": "decode8"}
    stored |= {"median": str(median), "q1": str(median - spread), "q3": str(median + spread), "unit": "tokens/s"}
    return stored | {"bytes_per_token": "", "of_limit": "", "date": "", "commit": commit, "command": "c"}


def store(folder: Path, rows: list[dict[str, object]], name: str = "cpu") -> None:
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_only_one_run_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "RESULTS", tmp_path)
    rates = [("dense", "a", 10), ("flattengpt 20%", "a", 12), ("dense", "b", 100), ("flattengpt 20%", "b", 150)]
    rates += [("dense", "b", 200), ("flattengpt 20%", "b", 300), ("dense", "c", 1000)]
    store(tmp_path, [row(*rate) for rate in rates])
    found = measured.cpu_speedups("flattengpt 20%", "decode8", "smollm2-135m", "bf16")
    assert [round(f.value, 3) for f in found] == [1.2, 1.5, 1.5]
    assert found[-1].rows == ("cpu.csv:7", "cpu.csv:6")
    assert found[-1].agrees(found[-2])
    assert not found[-1].agrees(found[0])
    assert "measured again since: 1,000.0" in found[-1].stale
    answer = Answer("what", "x", tuple(found))
    assert "the run before, the same code, agrees: 1.50x" in answer.text
    assert Answer("what", "x", tuple(found[:2])).short.endswith("(the run before disagrees)")


def test_rows_of_a_gpu_answer_at_the_true_size(tmp_path, monkeypatch):
    import bench_gpu

    monkeypatch.setattr(recorded, "RESULTS", tmp_path)
    settings = "64 x 64 + 128 tokens, group 0"
    place = {"machine": "a GPU", "date": "", "commit": "a", "command": "c"}
    dense = bench_gpu._row("llama-2-70b/4", "ours dense", "decode64", "tokens/s", [10, 11, 12], settings=settings)
    more = {"ratio": "1.231", "settings": settings}
    less = bench_gpu._row("llama-2-70b/4", "ours flattengpt 20%", "decode64", "tokens/s", [12, 13, 14], **more)
    store(tmp_path, [dense | place, less | place], "gpu")
    result = next(r for r in results() if r.claim.name == "flattengpt-70b-throughput")
    assert result.status == "measured on a part of the depth"
    (answer,) = result.answers
    assert answer.found[-1].value == 1.231
    assert answer.rows == ("gpu.csv:3", "gpu.csv:2")
    assert "20 of the 80 blocks" in answer.text and "a GPU" in answer.text


def test_several_seeds_are_told_with_their_deviation(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "RESULTS", tmp_path)
    head = "variant,blocks_fewer,repair,calibration,seed,tasks,perplexity,accuracy,commit,date\n"
    lines = ["dense,0,none,wikitext2,0,,10,,a,2027-01-01", "flattengpt,9,ridge,wikitext2,0,,20,,a,2027-01-01"]
    lines += ["flattengpt,9,ridge,wikitext2,1,,22,,a,2027-01-01", "flattengpt,9,ridge,builtin,2,,90,,a,2027-01-01"]
    (tmp_path / "quality.csv").write_text(head + "\n".join(lines) + "\n")
    found = measured.perplexity_ratio("flattengpt", 9, "ridge")
    assert found.value == pytest.approx(2.1)
    assert found.high - found.value == pytest.approx(0.02**0.5)
    assert found.note == "2 seeds"


def test_agreement_without_a_spread_is_equality():
    exact = Found(1.0, None, None, (), "")
    assert exact.agrees(exact)
    assert not exact.agrees(Found(1.1, 0.9, 1.2, (), ""))


@pytest.mark.parametrize("line", sorted({c for r in RESULTS for c in (r.claim.here, r.claim.true_size) if c}))
def test_commands_are_ones_that_the_tools_take(line):
    from depthprune_runtime.cli import build_parser

    for part in line.split(" && "):
        words = shlex.split(part)
        if words[0] == "depthprune":
            build_parser().parse_args(words[1:])
            continue
        assert words[0] == "python"
        if words[1] == "-m":  # lm-eval's own command line
            assert importlib.util.find_spec(words[2]) is not None
            continue
        source = (ROOT / words[1]).read_text()
        for option in [w for w in words if w.startswith("--")]:
            assert f'"{option}"' in source, option


def test_gpu_commands_parse():
    import bench_gpu

    for result in RESULTS:
        words = shlex.split(result.claim.true_size)
        if words[:2] == ["python", "benchmarks/bench_gpu.py"]:
            assert bench_gpu.arguments(words[2:]).output is not None


def test_the_command_line(capsys):
    claims.main(["--json"])
    assert [r["name"] for r in json.loads(capsys.readouterr().out)] == NAMES
    claims.main(["--measure", "flattengpt-70b-latency", "--true-size", "--print"])
    assert capsys.readouterr().out.startswith("python benchmarks/bench_gpu.py --models llama-2-70b/4")
    claims.main([])
    assert capsys.readouterr().out.count("  state ") == len(NAMES)
    with pytest.raises(SystemExit, match="no claim 'x'"):
        claims.main(["--measure", "x"])
    with pytest.raises(SystemExit, match="no command does that; it takes"):
        claims.main(["--measure", "shortgpt-rwkv"])


def test_measure_runs_the_command():
    assert claims.run("python -c 'raise SystemExit(3)'") == 3
