"""The benchmark beside other runtimes: what it hands them is the same model, and what it counts is what they made."""

from __future__ import annotations

import argparse
from pathlib import Path

import pico
import pytest
import torch
from peers import weights
from peers.measure import CASES, Machine, Measured, measure, prompts
from peers.processes import WorkerError
from peers.rows import Ratios, gain_of_bytes, limit_share
from peers.runtimes import Candidate
from peers.worker import Stopwatch

from depthprune_runtime import import_model
from depthprune_runtime.checkpoint import open_checkpoint


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = pico.save(pico.build_model("llama", torch.bfloat16), tmp_path / "source", tokenizer=False)
    import_model(folder, tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


@pytest.mark.parametrize("kind", ["huggingface", "gguf"])
def test_conversions_are_the_same_model(dense: Path, tmp_path: Path, kind: str):
    target = tmp_path / f"model.{kind}"
    getattr(weights, f"write_{kind}")(dense, target)
    assert open_checkpoint(target).digest() == open_checkpoint(dense).digest()


@pytest.mark.parametrize("name", list(weights.MODELS))
def test_plans_remove_what_their_names_say(name: str):
    from depthprune_runtime.pruning.plan import PrunePlan
    from depthprune_runtime.pruning.surgery import pruned_spec
    from depthprune_runtime.spec import AttentionSpec, DecoderSpec, FFNSpec, RopeSpec

    spec = weights.RandomCheckpoint().spec
    if name == "smollm2-135m":
        sublayers = [s for b in range(30) for s in (AttentionSpec(9, 3, 64, (b,)), FFNSpec(1536, (b,)))]
        spec = DecoderSpec(576, 49152, 8192, 1e-5, RopeSpec(), True, tuple(sublayers))
    plans = weights.MODELS[name].plans(spec)
    assert ("dense", *plans) == weights.VARIANTS
    for variant, edits in plans.items():
        pruned = pruned_spec(spec, PrunePlan(variant, "0" * 64, edits))
        removed = 1 - pruned.num_parameters() / spec.num_parameters()
        named = 0.0 if variant.endswith("wide") else float(variant.split()[1].rstrip("%")) / 100
        assert named - 1e-3 <= removed < named + 0.05, variant


def test_stopwatch_counts_the_tokens_after_the_first_of_every_prompt():
    watch = Stopwatch(2, 3)
    watch.add([(0, [5])])
    watch.add([(0, [6]), (1, [7])])
    assert watch.unfinished
    with pytest.raises(RuntimeError, match="asked for 3 tokens a prompt, got"):
        watch.result()
    watch.add([(0, [8]), (1, [9])])
    watch.add([(1, [1])])
    result = watch.result()
    assert not watch.unfinished
    assert result["after"] == 3
    assert result["tokens"] == [[5, 6, 8], [7, 9, 1]]
    assert 0 < result["first_s"] <= result["total_s"]


def test_prompts_are_fixed_and_differ_from_round_to_round():
    assert prompts("decode8", 0, 1000) == prompts("decode8", 0, 1000) != prompts("decode8", 1, 1000)
    assert [len(p) for p in prompts("decode8", 0, 1000)] == [32] * 8


def shown(runtime: str, variant: str = "dense", **samples: list[float]) -> Measured:
    return Measured(Candidate(runtime, variant, Path(), 1, 0), None, "", [], samples)  # type: ignore[arg-type]


def test_ratios_pair_the_rounds_and_reach_over_groups():
    ours = shown("ours", speed=[10.0, 20.0, 10.0], load_s=[1.0])
    peers = [
        shown("llama.cpp", speed=[20.0, 40.0, 5.0], load_s=[3.0]),
        shown("openvino", speed=[5.0] * 3, load_s=[2.0]),
    ]
    ratios = Ratios()
    ratios.see([ours, *peers])
    assert ratios.of(ours, "speed", [ours, *peers]) == ("0.500", "llama.cpp")
    assert ratios.of(ours, "load_s", [ours, *peers]) == ("2.000", "openvino")
    again, pruned = shown("ours", speed=[8.0] * 3), shown("ours", "shortgpt 25%", speed=[12.0] * 3)
    ratios.see([again, pruned])
    assert ratios.of(pruned, "speed", [again, pruned]) == ("0.750", "llama.cpp")
    assert ratios.of(pruned, "other", [again, pruned]) == ("", "")


def test_gain_is_the_speedup_over_dense_by_the_bytes_that_a_token_reads():
    def model(variant: str, nbytes: int, *rates: float) -> Measured:
        one = shown("ours", variant, **{"decode1@32": list(rates), "prefill512": list(rates)})
        one.candidate = Candidate("ours", variant, Path(), nbytes, 10)
        return one

    dense, pruned = model("dense", 3620, 10.0, 30.0), model("shortgpt 25%", 1620, 15.0, 60.0)
    group = [dense, pruned]
    assert gain_of_bytes(pruned, "decode1@32", 12, group) == "0.875"  # 1.5 and 2 of 4000 / 2000 bytes
    assert gain_of_bytes(pruned, "prefill512", 12, group) == ""
    assert gain_of_bytes(dense, "decode1@32", 12, group) == ""
    assert gain_of_bytes(pruned, "decode1@32", 12, [pruned]) == ""


class _Worker:
    """Stands for a process: takes a second a token, and breaks at the request `breaks`."""

    def __init__(self, breaks: int = -1) -> None:
        self.seen: list[tuple[int, int]] = []
        self._breaks = breaks

    def ask(self, do: str, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        if len(self.seen) == self._breaks:
            raise WorkerError("broken")
        self.seen.append((len(prompts), len(prompts[0])))
        return {"first_s": 1.0, "total_s": float(tokens), "after": tokens - 1}

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


def test_every_turn_has_all_who_are_left_and_the_limits_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("peers.measure.SETTLE_SECONDS", 0)
    monkeypatch.setattr("peers.measure.BUFFER_BYTES", 4096)
    monkeypatch.setattr("peers.measure.MATMUL", 8)
    good, bad = _Worker(), _Worker(breaks=len(CASES) + 1)
    running = [Measured(Candidate(name, "dense", Path(), 4000, 0), w, "", []) for name, w in (("a", good), ("b", bad))]  # type: ignore[arg-type]
    machine = Machine(4000)
    measure(running, machine, 1000, 3, argparse.Namespace(rounds=2, cases=list(CASES)))
    assert [one.candidate.runtime for one in running] == ["a"]
    for name, case in CASES.items():
        assert len(running[0].samples[name]) == len(machine.read_model[name]) == 2 * case.turns
        assert good.seen.count((case.batch, case.length)) == 1 + 2 * case.turns
    assert len(machine.samples["read_large"]) == 2 * sum(case.turns for case in CASES.values())
    machine.read_model["decode1@32"] = [8e-6] * 6  # GB/s; a token a second reads 4000 bytes
    assert limit_share(running[0], "decode1@32", 3, machine) == ("4000", "0.500", "read_model")
