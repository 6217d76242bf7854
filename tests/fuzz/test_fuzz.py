"""Some hundred mutants of every format we read: each is refused in one line, warned about, or right.

`make fuzz MUTANTS=100000` runs more of them; `tests/fuzz/run.py --format F --seed N` runs one again.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from fuzz import campaign, gguf_file, json_mutants, safetensors_file, sandbox, uses
from fuzz.campaign import FORMATS, Bench, schedule
from fuzz.mutation import Mutant, Mutation
from fuzz.native_mutants import HEAD, NativeFile
from fuzz.originals import Original
from fuzz.sandbox import Report, run_child, run_children
from fuzz.uses import Observation
from fuzz.verdicts import judge

from depthprune_runtime import SamplingParams

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
    results = bench.results((name, seed) for seed in SEEDS[name])
    assert [r.seed for r in results] == SEEDS[name]
    failed = [r for r in results if not r.verdict.good]
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


def test_a_refusal_may_name_an_argument_of_the_job():
    assert _outcome(_seen(refused=("prune", "blocks: expected 0 to 0 of 1, got 1"))) == "refused"
    assert _outcome(_seen(refused=("prune", "there are too many blocks: 5"))) == "vague"
    assert _outcome(_seen(refused=("add_request", "the queue holds 1 of 64 (max_waiting)"))) == "refused"


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, True),
        ({"temperature": 0.7, "pad_token_id": 1}, True),
        ({"top_k": 40, "top_p": 0.9}, False),
        ({"do_sample": True, "bos_token_id": 0}, False),
        ({"temperature": 0.7, "transformers_version": "5.0"}, False),
        ({"eos_token_id": 1, "repetition_penalty": 1.5}, False),
    ],
)
def test_values_exchanged_are_meant_where_both_keys_may_hold_them(values, meant):
    """A key that is not read may hold anything."""
    rules = json_mutants.Rules(defaults=True, last_wins=True, fields=json_mutants.GENERATION_FIELDS)
    made = [json_mutants.mutate_json(random.Random(seed), values, "d", rules)[1] for seed in range(400)]
    assert {m.meant for m in made if m.kind == "swap"} == {meant}


def test_zero_is_meant_only_where_a_number_may_be_zero():
    for names, expected in ((("distance",), True), ((), False)):
        rules = json_mutants.Rules(may_be_zero=names)
        made = [json_mutants.mutate_json(random.Random(s), {"distance": 0.5}, "d", rules)[1] for s in range(400)]
        assert {m.meant for m in made if m.kind == "zero" and m.path} == {expected}


def test_a_call_is_judged_by_the_options_that_replace_its_parameters():
    params = SamplingParams(max_tokens=100, n=2)
    assert uses._asked(params, {"max_new_tokens": 3}) == SamplingParams(max_tokens=3, n=2)
    assert uses._asked(params, {"n": 3, "tools": []}) == SamplingParams(max_tokens=100, n=3)


def test_children_that_end_badly(monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(sandbox, "IDLE_SECONDS", 1)
    assert _outcome(run_child(lambda: Observation({"logits": "1"}))) == "ok"
    assert _outcome(run_child(_fail)) == "traceback"
    assert _outcome(run_child(_endless)) == "hang"
    assert _outcome(run_child(_asleep)) == "hang"
    assert _outcome(run_child(_greedy)) == "memory"
    assert _outcome(run_child(_killed)) == "signal"


@pytest.mark.parametrize(
    ("fault", "end"),
    [("fail", "error"), ("endless", "hang"), ("asleep", "hang"), ("greedy", "memory"), ("killed", "signal")],
)
def test_a_child_stops_at_the_work_that_fails(monkeypatch, fault, end):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(sandbox, "IDLE_SECONDS", 1)
    fine = [lambda i=i: print(f"work {i}") or i for i in range(3)]
    reports = run_children([*fine, _FAULTS[fault], fine[0]])
    assert [r.end for r in reports] == ["done", "done", "done", end]
    assert [r.value for r in reports[:3]] == [0, 1, 2]
    assert [r.printed for r in reports[:3]] == ["work 0\n", "work 1\n", "work 2\n"]
    assert "work 0" not in reports[3].printed


def test_memory_is_counted_from_the_childs_beginning(monkeypatch):
    """So that what earlier work kept cannot hide what later work takes."""
    monkeypatch.setattr(sandbox, "MEMORY", 64 << 20)
    kept = []
    reports = run_children([lambda: kept.append(b"\x01" * (40 << 20))] * 3)
    assert [r.end for r in reports] == ["done", "memory"]


def test_time_is_counted_for_each_work(monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 2)
    assert [r.end for r in run_children([lambda: _busy(0.7)] * 4)] == ["done"] * 4


_AROUND = (("requests", 0), ("state", 0), ("requests", 3), ("state", 1))


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("fail", "traceback"),
        ("endless", "hang"),
        ("greedy", "memory"),
        ("killed", "signal"),
        ("changed", "changed"),
        ("complaint", "broken"),
    ],
)
def test_a_fault_among_good_mutants_is_found(bench, monkeypatch, fault, outcome):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(campaign, "use_other", lambda path, folder: _FAULTS[fault]())
    results = bench.results([*_AROUND[:2], ("other", 1), *_AROUND[2:]])
    assert [(r.format, r.seed) for r in results] == [*_AROUND[:2], ("other", 1), *_AROUND[2:]]
    assert results[2].verdict.outcome == outcome
    assert all(r.verdict.good and not r.behind for i, r in enumerate(results) if i != 2)


def test_only_a_child_of_its_own_decides_that_a_mutant_is_bad(bench, monkeypatch):
    """A fault behind others is named; what passed before it runs again as well."""
    original, ran = bench.originals["other"][0], []
    mutant = replace(bench._plain(original), mutations=(Mutation("number", "config.json"),))

    def use(path, folder):
        ran.append(path)
        return _FAULTS["changed"]() if len(ran) > 1 else original.baseline

    monkeypatch.setattr(campaign, "use_other", use)
    monkeypatch.setattr(bench, "mutant", lambda name, seed: mutant)
    results = bench.results([("other", 0)] * 3)
    assert [r.verdict.outcome for r in results] == ["ok"] * 3
    assert [bool(r.behind) for r in results] == [False, True, True]


def test_parts_of_a_campaign_add_up():
    whole = list(schedule(1000))
    assert [*schedule(300), *schedule(1, 300), *schedule(699, 301)] == whole
    assert len(set(whole)) == 1000
    assert {name for name, _ in schedule(60, 940)} == set(FORMATS)


def _fail() -> None:
    raise KeyError("x")


def _endless() -> None:
    while True:
        pass


def _asleep() -> None:
    time.sleep(60)


def _killed() -> None:
    ctypes.string_at(0)


def _busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def _greedy() -> None:
    bytearray(2 << 30)


_FAULTS: dict[str, Callable[[], object]] = {
    "fail": _fail,
    "endless": _endless,
    "asleep": _asleep,
    "greedy": _greedy,
    "killed": _killed,
    "changed": lambda: Observation({"dropped": "none"}),
    "complaint": lambda: Observation(complaints=["the text is lost"]),
}


def test_what_a_child_prints_comes_back():
    report = run_child(lambda: print("said \x1b[1m"))
    assert report.printed == "said \x1b[1m\n"
