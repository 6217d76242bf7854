"""Some hundred mutants of every format we read: each is refused in one line, warned about, or right.

`make fuzz MUTANTS=100000` runs more of them; `tests/fuzz/run.py --format F --seed N` runs one again.
"""

from __future__ import annotations

import random

import pytest
from fuzz import gguf_file, json_mutants, safetensors_file, sandbox
from fuzz.campaign import FORMATS, Bench, schedule
from fuzz.mutation import Mutant, Mutation
from fuzz.native_mutants import HEAD, NativeFile
from fuzz.originals import Original
from fuzz.sandbox import Report, run_child
from fuzz.uses import Observation
from fuzz.verdicts import judge

MUTANTS = 320
SEEDS = {name: [s for f, s in schedule(MUTANTS) if f == name] for name in FORMATS}


@pytest.fixture(scope="module")
def bench():
    made = Bench()
    made.prepare()
    yield made
    made.close()


@pytest.mark.parametrize("name", list(FORMATS))
def test_mutants(bench, name):
    assert SEEDS[name]
    failed = [r for r in (bench.result(name, seed) for seed in SEEDS[name]) if not r.verdict.good]
    lines = [
        f"--format {r.format} --seed {r.seed}: {r.verdict.outcome}: {r.verdict.why}\n    {r.mutant}" for r in failed
    ]
    assert not failed, "\n".join(["run one again with tests/fuzz/run.py", *lines])


@pytest.mark.parametrize("name", ["native", "shards", "quantized"])
def test_a_file_put_together_again_is_the_same(bench, name):
    for original in bench.originals[name]:
        made = NativeFile(original.files).assemble()
        assert set(made) == set(original.files)
        assert {n: d for n, d in made.items() if n != HEAD} == {n: d for n, d in original.files.items() if n != HEAD}
        assert safetensors_file.take_apart(made[HEAD]) == safetensors_file.take_apart(original.files[HEAD])


def test_a_gguf_file_put_together_again_is_the_same(bench):
    for original in bench.originals["gguf"]:
        data = original.files["model.gguf"]
        assert gguf_file.take_apart(data).assemble() == data


def test_a_seed_decides_its_mutant(bench):
    for name in FORMATS:
        assert bench.mutant(name, 3).files == bench.mutant(name, 3).files
        assert len({str(bench.mutant(name, seed)) for seed in range(12)}) > 6


def test_json_mutants_reach_every_part():
    document = {"a": {"b": [1, 2, {"c": "x"}]}, "d": True, "e": 0.5}
    seen = {json_mutants.mutate_json(random.Random(s), document, "d", json_mutants.Rules())[1].path for s in range(600)}
    assert {("a",), ("a", "b"), ("a", "b", 0), ("a", "b", 2, "c"), ("d",), ("e",)} <= seen
    assert document == {"a": {"b": [1, 2, {"c": "x"}]}, "d": True, "e": 0.5}


def _outcome(report: Report, meant: bool = False, names: str = "rope") -> str:
    mutation = Mutation("number", "config.json", (names,), meant)
    original = Original("huggingface", "o", {}, ".", baseline=Observation({"logits": "1"}))
    return judge(report, Mutant("huggingface", 7, "o", (mutation,)), original).outcome


def _seen(**fields: object) -> Report:
    return Report(value=Observation(**fields))


def test_outcomes_of_children_that_end_well():
    assert _outcome(_seen(results={"logits": "1"})) == "ok"
    assert _outcome(_seen(results={"logits": "2"})) == "changed"
    assert _outcome(_seen(results={"logits": "2"}), meant=True) == "meant"
    warned = _seen(results={"logits": "2"})
    warned.warnings = ["config.json: rope is not known"]
    assert _outcome(warned) == "warned"
    assert _outcome(_seen(refused=("load", "config.json: rope: expected a number"))) == "refused"
    assert _outcome(_seen(refused=("load", "something is wrong"))) == "vague"
    assert _outcome(_seen(refused=("load", "config.json: rope:\nexpected a number"))) == "noise"
    assert _outcome(_seen(refused=("load", "config.json: \x1b[31mrope"))) == "noise"
    assert _outcome(_seen(refused=("load", "rope " * 300))) == "noise"
    assert _outcome(_seen(results={"logits": "1"}, shown=["a\x1b[2Jb"])) == "noise"
    assert _outcome(_seen(results={"logits": "1"}, complaints=["the text is lost"])) == "broken"


def test_children_that_end_badly(monkeypatch):
    def fail() -> None:
        raise KeyError("x")

    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(sandbox, "IDLE_SECONDS", 1)
    assert _outcome(run_child(lambda: Observation({"logits": "1"}))) == "ok"
    assert _outcome(run_child(fail)) == "traceback"
    assert _outcome(run_child(_endless)) == "hang"
    assert _outcome(run_child(_asleep)) == "hang"
    assert _outcome(run_child(lambda: bytearray(2 << 30))) == "memory"
    assert _outcome(run_child(_killed)) == "signal"


def _endless() -> None:
    while True:
        pass


def _asleep() -> None:
    import time

    time.sleep(60)


def _killed() -> None:
    import ctypes

    ctypes.string_at(0)


def test_what_a_child_prints_comes_back():
    report = run_child(lambda: print("said \x1b[1m"))
    assert report.printed == "said \x1b[1m\n"
