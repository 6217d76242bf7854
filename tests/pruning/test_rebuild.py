"""Narrowing and repair as `prune` runs them: exactness, gain, streaming, crashes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import pico
import pytest
import torch

from depthprune_runtime import FlattenGPTOptions, Runtime, prune
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting import states
from depthprune_runtime.fitting.calibration import stream_hidden_states
from depthprune_runtime.fitting.options import RepairOptions
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import SublayerLoader
from depthprune_runtime.pruning.plan import Drop, Flatten, PrunePlan
from depthprune_runtime.pruning.rebuild import Narrowing, Rebuild
from depthprune_runtime.pruning.surgery import PrunedCheckpoint

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (24, 32), generator=torch.Generator().manual_seed(0))
FRESH = torch.randint(2, pico.VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(9))
SMALL = {"samples": 8, "seq_len": 48}
METHODS = {
    "shortgpt": {"blocks": 2},
    "finercut": {"sublayers": 3},
    "flattengpt": {"blocks": 2},
}


def rebuilt(pico_file, edits, narrowing=None, repair=None):
    plan = PrunePlan("test", "", edits)
    with torch.inference_mode():
        rebuild = Rebuild(open_checkpoint(pico_file), plan, narrowing, repair, CPU)
        return rebuild.run(rebuild.walk(WINDOWS))


def error(pico_runtime, checkpoint):
    """Relative error of the logits on the calibration tokens: what random weights compute of one token says
    nothing of another."""
    ours = Runtime(checkpoint, CPU, torch.float32).logits(WINDOWS)
    theirs = pico_runtime.logits(WINDOWS)
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("edits", [(), (Flatten((2, 3)),)])
def test_keeping_all_units_without_repair_changes_nothing(pico_file, edits):
    plan = PrunePlan("test", "", edits)
    units = {2 * 2: 6, 2 * 2 + 1: 160} if edits else {}
    narrowing = Narrowing(units, leverage_lam=1e-6)
    checkpoint, _ = rebuilt(pico_file, edits, narrowing)
    wide = Runtime(PrunedCheckpoint(open_checkpoint(pico_file), plan), CPU, torch.float32).logits(FRESH)
    ours = Runtime(checkpoint, CPU, torch.float32).logits(FRESH)
    assert float((ours - wide).norm() / wide.norm()) < 1e-5


@pytest.mark.parametrize("answers_for", ["before", "after"])
@pytest.mark.parametrize(
    "edits", [(Drop(4), Drop(5)), (Drop(3),), (Flatten((2, 3)),), (Drop(10), Drop(11)), (Drop(0),)]
)
def test_repair_brings_the_student_nearer_to_the_teacher(pico_file, pico_runtime, edits, answers_for):
    """Also where the first or the last sub-layers went."""
    plain = PrunedCheckpoint(open_checkpoint(pico_file), PrunePlan("test", "", edits))
    repaired, plan = rebuilt(pico_file, edits, repair=RepairOptions(lam=1e-3, answers_for=answers_for))
    assert plan.edits == edits
    assert error(pico_runtime, repaired) < error(pico_runtime, plain)


def test_a_huge_ridge_repairs_nothing(pico_file, pico_runtime):
    edits = (Drop(4), Drop(5))
    plain = PrunedCheckpoint(open_checkpoint(pico_file), PrunePlan("test", "", edits))
    repaired, _ = rebuilt(pico_file, edits, repair=RepairOptions(lam=1e12))
    assert error(pico_runtime, repaired) == pytest.approx(error(pico_runtime, plain), rel=1e-3)


def test_repair_touches_only_output_projections_after_the_first_edit(pico_file):
    repaired, _ = rebuilt(pico_file, (Drop(6), Drop(7)), repair=RepairOptions())
    plain = PrunedCheckpoint(open_checkpoint(pico_file), PrunePlan("test", "", (Drop(6), Drop(7))))
    changed = {n for n in plain.spec.tensor_shapes() if not torch.equal(plain.tensor(n), repaired.tensor(n))}
    expected = {f"sublayers.{i}.{'down' if i % 2 else 'o'}_proj.weight" for i in range(5, 10)}
    assert changed == expected


@pytest.mark.parametrize(("answers_for", "expected"), [("before", "sublayers.5.down"), ("after", "sublayers.6.o")])
def test_a_repair_of_what_was_edited_touches_what_answers_for_it(pico_file, pico_runtime, answers_for, expected):
    plain = PrunedCheckpoint(open_checkpoint(pico_file), PrunePlan("test", "", (Drop(6), Drop(7))))
    options = RepairOptions(lam=1e-3, answers_for=answers_for, scope="edited")
    repaired, _ = rebuilt(pico_file, (Drop(6), Drop(7)), repair=options)
    changed = {n for n in plain.spec.tensor_shapes() if not torch.equal(plain.tensor(n), repaired.tensor(n))}
    assert changed == {f"{expected}_proj.weight"}
    assert error(pico_runtime, repaired) < error(pico_runtime, plain)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(
    ("edits", "narrowing"),
    [((Drop(4), Drop(5)), None), ((Flatten((1, 2)),), Narrowing({2: 3, 3: 80}))],
    ids=["dropped", "narrowed"],
)
def test_strength_lies_between_the_pruned_and_the_repaired_weights(pico_file, edits, narrowing, strength):
    whole, plan = rebuilt(pico_file, edits, narrowing, RepairOptions())
    part, same = rebuilt(pico_file, edits, narrowing, RepairOptions(strength=strength))
    assert same == plan  # the walk goes on at full strength: nothing later differs
    pruned = PrunedCheckpoint(open_checkpoint(pico_file), plan)
    moved = 0
    for name in pruned.spec.tensor_shapes():
        start, end = pruned.tensor(name).float(), whole.tensor(name).float()
        moved += not torch.equal(start, end)
        torch.testing.assert_close(part.tensor(name).float(), start + strength * (end - start), rtol=1e-5, atol=1e-6)
    assert moved > 1


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan"), "much"])
def test_a_strength_that_is_no_share_is_refused(strength):
    with pytest.raises(InputError, match="repair strength: expected a number from"):
        RepairOptions(strength=strength)


@pytest.mark.parametrize("repair", [None, RepairOptions()])
def test_narrowing_keeps_the_original_width(pico_file, repair):
    narrowing = Narrowing({2: 3, 3: 80})
    checkpoint, plan = rebuilt(pico_file, (Flatten((1, 2)),), narrowing, repair)
    assert checkpoint.spec.uniform() is not None
    assert len(checkpoint.spec.sublayers) == 10
    assert {e.sublayer: len(e.keep) for e in plan.edits[1:]} == {2: 3, 3: 80}
    assert PrunePlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("options", [{}, {"leverage_lam": 0.01}], ids=["shipped", "strong"])
def test_compensation_helps(pico_file, options):
    """What the narrowed FFN puts out errs less against the wide one: on the calibration tokens at any ridge."""
    checkpoint = open_checkpoint(pico_file)
    wide = PrunedCheckpoint(checkpoint, PrunePlan("test", "", (Flatten((1, 2)),)))
    stream = stream_hidden_states(wide, WINDOWS, CPU, torch.float32)
    entering, leaving = next((before.clone(), after.clone()) for i, before, after in stream if i == 3)
    errors = {}
    for compensate in (False, True):
        narrowing = Narrowing({3: 80}, compensate=compensate, **options)
        narrowed, _ = rebuilt(pico_file, (Flatten((1, 2)),), narrowing)
        sublayer = SublayerLoader(narrowed.spec, narrowed.tensor, CPU, torch.float32).sublayer(3)
        flat = entering.flatten(0, 1)
        ours = flat + sublayer(flat, packed([32] * len(WINDOWS), CPU))
        errors[compensate] = float((ours - leaving.flatten(0, 1)).norm())
    assert errors[True] < 0.999 * errors[False]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_streams_to_the_same_file(pico_llama, tmp_path, method, monkeypatch):
    """All buffers in files, tiny batches: the same plan and the same weights as in memory."""
    in_memory = prune(pico_llama[1], tmp_path / "memory", method, **METHODS[method], **SMALL)
    monkeypatch.setattr(states, "MEMORY_LIMIT", 0)
    streamed = prune(pico_llama[1], tmp_path / "streamed", method, **METHODS[method], **SMALL)
    assert streamed.plan == in_memory.plan
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "memory").read_bytes()
    assert open_checkpoint(tmp_path / "memory").plan == in_memory.plan.to_json()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_flattengpt_on_every_family(family, tmp_path):
    model = pico.build_model(family, num_hidden_layers=4)
    folder = pico.save(model, tmp_path / "model")
    for keep_width, groups in ((0.0, 3), (0.4, 4), (1.0, 6)):
        path = tmp_path / f"p{keep_width}"
        result = prune(folder, path, blocks=1, options=FlattenGPTOptions(keep_width=keep_width), **SMALL)
        merged = next(s for s in result.spec.attention_sublayers() if len(s.origin) == 2)
        assert merged.num_kv_heads == groups
        assert str(Runtime.load(path).generate("the quick", max_new_tokens=4, ignore_eos=True)) != ""
        assert (result.spec.uniform() is not None) == (keep_width == 0.0)


# Runs the command line, and stops for ever once some tensors of the output are written.
STOPS_WHILE_WRITING = """
import sys, threading
from depthprune_runtime.checkpoint import container
from depthprune_runtime.cli import main

checksum, written = container.checksum, []

def stopping(data):
    written.append(data)
    if len(written) == int(sys.argv[1]):
        print("writing", flush=True)
        threading.Event().wait()
    return checksum(data)

container.checksum = stopping
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("method", "before"), [("shortgpt", "a model"), ("finercut", "nothing"), ("flattengpt", "nothing")]
)
def test_killed_while_writing_it_leaves_what_was_there(pico_file, tmp_path, method, before):
    target = tmp_path / "out"
    if before == "a model":
        shutil.copy(pico_file, target)
    amount = ["--sublayers", "3"] if method == "finercut" else ["--blocks", "2"]
    arguments = ["prune", pico_file, "-o", target, "--method", method, *amount, "--samples", "8", "--seq-len", "48"]
    arguments += ["--force"] if before == "a model" else []
    command = [sys.executable, "-c", STOPS_WHILE_WRITING, "20", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout.readline() == b"writing\n"  # empty if it ended without
            process.kill()
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    left = [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    if before == "nothing":
        assert left == []
    else:
        assert left == [target]
        assert target.read_bytes() == pico_file.read_bytes()
    prune(pico_file, target, method, overwrite=True, **METHODS[method], **SMALL)
    assert open_checkpoint(target).plan["method"] == method
