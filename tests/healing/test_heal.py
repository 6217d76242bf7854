"""`heal` end to end on a pico model: what changes, what does not, and that an interruption leaves no trace."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pico
import pytest
import torch

from depthprune_runtime import InputError, Runtime, import_model, prune
from depthprune_runtime.checkpoint import open_checkpoint, write_native
from depthprune_runtime.cli import main
from depthprune_runtime.cli.interrupt import Written
from depthprune_runtime.healing import train
from depthprune_runtime.healing.data import Source, packed_windows
from depthprune_runtime.healing.heal import HealedCheckpoint, first_trained, heal
from depthprune_runtime.healing.options import HealOptions, heal_options
from depthprune_runtime.healing.schedule import held_out
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint
from depthprune_runtime.quantization.quantize import quantize
from depthprune_runtime.text.tokenizer import Tokenizer

SMALL = HealOptions(
    tokens=12 * 4 * 32, batch=4, seq_len=32, held_out=4, learning_rate=0.003, eval_every=6, save_every=4, top_k=16
)


@pytest.fixture(scope="module")
def pruned(pico_file, tmp_path_factory):
    """Block 3 of 6 is gone, and nothing else is changed."""
    path = tmp_path_factory.mktemp("pruned") / "p.safetensors"
    dense = open_checkpoint(pico_file)
    write_native(path, PrunedCheckpoint(dense, PrunePlan("test", dense.digest(), (Drop(6), Drop(7)))))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of some hundred windows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"the quick brown fox {n}" for n in range(800)))
    return str(path)


@pytest.fixture(scope="module")
def healed(pruned, pico_file, tmp_path_factory, text):
    path = tmp_path_factory.mktemp("healed") / "h.safetensors"
    return heal(pruned, path, teacher=pico_file, data=[text], options=SMALL)


def differing(first, second):
    ours, theirs = open_checkpoint(first).checksums(), open_checkpoint(second).checksums()
    assert set(ours) == set(theirs)
    return {name for name in ours if ours[name] != theirs[name]}


def test_the_loss_falls_and_the_file_says_how(healed, pruned, pico_file):
    losses = [report["loss"] for report in healed.history]
    assert [report["step"] for report in healed.history] == [0, 6, 12]
    assert losses[2] < losses[1] < losses[0] and losses[2] < 0.95 * losses[0]
    checkpoint = open_checkpoint(healed.path)
    (healing,) = checkpoint.provenance["healing"]
    assert healing["teacher_digest"] == open_checkpoint(pico_file).digest()
    assert (healing["steps"], healing["tokens"], healing["rank"]) == (12, 12 * 4 * 32, 8)
    assert healing["held_out_history"] == list(healed.history)
    assert checkpoint.plan == open_checkpoint(pruned).plan
    assert checkpoint.spec == open_checkpoint(pruned).spec
    assert list(healed.path.parent.iterdir()) == [healed.path]
    assert str(Runtime.load(healed.path, device="cpu").generate("the quick", max_new_tokens=3, ignore_eos=True))


def test_the_reported_loss_is_that_of_the_written_model(pico_file, pruned, tmp_path, text):
    """By the runtime, over the whole vocabulary, on the same windows."""
    options = dataclasses.replace(SMALL, top_k=10**6, tokens=4 * 4 * 32)
    result = heal(pruned, tmp_path / "h", teacher=pico_file, data=[text], options=options)
    windows = packed_windows([Source(text)], Tokenizer(open_checkpoint(pruned)), 32, pico.VOCAB_SIZE).ids
    teacher, student = (Runtime.load(path, device="cpu") for path in (pico_file, result.path))
    losses = []
    for window in windows[held_out(len(windows), options)]:
        p, q = (torch.log_softmax(runtime.logits(window.tolist()), -1) for runtime in (teacher, student))
        losses.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert result.history[-1]["loss"] == pytest.approx(sum(losses) / len(losses), rel=0.01)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_only_what_lies_behind_the_first_edit_changes(pruned, pico_file, tmp_path, text, kind):
    options = dataclasses.replace(SMALL, train=kind, tokens=2 * 4 * 32)
    result = heal(pruned, tmp_path / "h", teacher=pico_file, data=[text], options=options)
    spec = open_checkpoint(pruned).spec
    behind = [name for i in range(6, len(spec.sublayers)) for name in spec.sublayer_shapes(i)]
    projections = {name for name in behind if name.endswith("_proj.weight")}
    expected = projections if kind == "lora" else {*behind, "norm.weight"}
    assert set(result.trained) == differing(pruned, tmp_path / "h") == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": "full", "optimizer": "adafactor", "recompute": True},
        {"cache": False, "hidden_weight": 0.5, "micro_batch": 2},
    ],
    ids=["lora", "low memory", "without a cache"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(pruned, pico_file, tmp_path, monkeypatch, changes, text):
    options = dataclasses.replace(SMALL, **changes)
    arguments = {"teacher": pico_file, "data": [text], "options": options}
    heal(pruned, tmp_path / "through", **arguments)
    step, calls = train.Training._step, []

    def stops(self, *given):
        calls.append(given)
        if len(calls) == 8:  # three steps behind the last save
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(train.Training, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        heal(pruned, tmp_path / "again", **arguments)
    assert not (tmp_path / "again").exists()
    with pytest.raises(InputError, match=r"an earlier run is there; go on with --resume"):
        heal(pruned, tmp_path / "again", **arguments)
    other = {**arguments, "options": dataclasses.replace(options, learning_rate=0.01)}
    with pytest.raises(InputError, match=r"of another run: expected learning_rate 0.01, got 0.003"):
        heal(pruned, tmp_path / "again", **other, resume=True)
    heal(pruned, tmp_path / "again", **arguments, resume=True)
    assert len(calls) == 8 + 8  # four steps were saved
    assert (tmp_path / "again").read_bytes() == (tmp_path / "through").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "through"]


def test_the_cache_changes_nothing(pruned, pico_file, tmp_path, text):
    for name, cache in (("a", True), ("b", False)):
        options = dataclasses.replace(SMALL, cache=cache, tokens=2 * 4 * 32)
        heal(pruned, tmp_path / name, teacher=pico_file, data=[text], options=options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_damaged_state_is_refused(pruned, pico_file, tmp_path, text):
    (tmp_path / "h.heal").mkdir()
    (tmp_path / "h.heal" / "state.pt").write_bytes(b"no state")
    arguments = {"teacher": pico_file, "data": [text], "options": SMALL}
    with pytest.raises(InputError, match="damaged or of another kind; begin anew with --force"):
        heal(pruned, tmp_path / "h", **arguments, resume=True)
    heal(pruned, tmp_path / "h", **arguments, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["h"]


def test_a_healed_file_heals_again_and_keeps_what_was_done(healed, pico_file, tmp_path, text):
    heal(healed.path, tmp_path / "h", teacher=pico_file, data=[text], options=SMALL)
    done = open_checkpoint(tmp_path / "h").provenance["healing"]
    assert len(done) == 2
    assert done[1]["held_out_history"][0]["loss"] == pytest.approx(done[0]["held_out_history"][-1]["loss"], rel=1e-4)


def test_what_is_stored_in_bfloat16_heals(pico_llama, tmp_path, text):
    import_model(pico_llama[1], tmp_path / "dense", dtype="bf16")
    prune(tmp_path / "dense", tmp_path / "p", drop="3", repair="none")
    result = heal(tmp_path / "p", tmp_path / "h", teacher=tmp_path / "dense", data=[text], options=SMALL)
    assert result.history[-1]["loss"] < 0.97 * result.history[0]["loss"]
    assert open_checkpoint(tmp_path / "h").dtype == torch.bfloat16


def test_training_begins_where_the_repair_does(pico_file, tmp_path):
    """A repair lets the FFN before a dropped block answer for it."""
    prune(pico_file, tmp_path / "p", drop="3", samples=4, seq_len=32)
    assert first_trained(open_checkpoint(tmp_path / "p"), open_checkpoint(pico_file)) == 5


def test_what_follows_nothing_answers_for_the_end(pico_file, tmp_path):
    prune(pico_file, tmp_path / "p", drop="4-5", repair="none")
    assert first_trained(open_checkpoint(tmp_path / "p"), open_checkpoint(pico_file)) == 7
    prune(pico_file, tmp_path / "q", blocks=0, samples=4, seq_len=32)
    with pytest.raises(InputError, match="nothing to heal"):
        first_trained(open_checkpoint(tmp_path / "q"), open_checkpoint(pico_file))


def refused(message, *arguments, **options):
    with pytest.raises(InputError, match=message) as caught:
        heal(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_healed_is_refused(pruned, pico_file, tmp_path, text):
    given = {"teacher": pico_file, "data": [text], "options": SMALL}
    out = tmp_path / "h"
    refused("got a dense model without a plan; prune it first", pico_file, out, **given)
    refused("expected at least one text to train on, got none", pruned, out, **{**given, "data": []})
    refused("no such file", pruned, out, **{**given, "data": [str(tmp_path / "missing.txt")]})
    (tmp_path / "short.txt").write_text("the quick brown fox")
    refused("do not fill a window of 32", pruned, out, **{**given, "data": [str(tmp_path / "short.txt")]})
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"prompt": "x"}\n')
    refused(
        r"bad.jsonl: line 2: expected an object with `text`",
        pruned,
        out,
        **{**given, "data": [f"{tmp_path}/bad.jsonl"]},
    )
    other = pico.save(pico.build_model("llama", num_hidden_layers=6, vocab_size=400), tmp_path / "other")
    refused("expected the same vocabulary of 384 tokens, got 400", pruned, out, **{**given, "teacher": other})
    twin = pico.save(pico.build_model("llama", num_hidden_layers=6, seed=1), tmp_path / "twin")
    refused("expected the model that .* was pruned from", pruned, out, **{**given, "teacher": twin})
    refused("seq_len: expected at most", pruned, out, **{**given, "options": HealOptions(seq_len=512)})
    refused("less than one step", pruned, out, **{**given, "options": dataclasses.replace(SMALL, tokens=64)})
    refused("fp16, in which gradients vanish", pruned, out, **given, dtype="fp16")
    quantize(pruned, tmp_path / "q", 8, samples=4, seq_len=32)
    refused("heal first, then quantise", tmp_path / "q", out, **given)
    refused("which this job reads", pruned, pruned, **given)
    assert not out.exists() and not out.with_name("h.heal").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "some"}, "train: expected one of lora, full, got 'some'"),
        ({"rank": 0}, "rank: expected an integer from 1 on, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, got 0.0"),
        ({"micro_batch": 3}, "micro_batch: expected a divisor of batch 8, got 3"),
        ({"warmup": 1.5}, "warmup: expected a number from 0.0 to 1.0, got 1.5"),
        ({"recompute": 1}, "recompute: expected True or False, got 1"),
    ],
)
def test_options_refuse_what_they_are_not(changes, message):
    with pytest.raises(InputError, match=message):
        HealOptions(**changes)


def test_presets():
    assert dataclasses.asdict(heal_options("paper")) == dataclasses.asdict(HealOptions())
    assert heal_options("low-memory", seed=3) == HealOptions(
        train="full", optimizer="adafactor", recompute=True, seed=3
    )
    with pytest.raises(InputError, match="preset: expected one of paper, low-memory, got 'fast'"):
        heal_options("fast")


def test_what_is_not_changed_is_read_from_the_parent(pruned):
    parent = open_checkpoint(pruned)
    view = HealedCheckpoint(parent, {"norm.weight": torch.ones(parent.spec.hidden_size)}, {"steps": 1})
    assert view.tensor("embed_tokens.weight").equal(parent.tensor("embed_tokens.weight"))
    assert view.stored_checksum("norm.weight") is None
    assert json.loads(json.dumps(view.provenance))["healing"] == [{"steps": 1}]


def test_the_command_line(pruned, pico_file, text, tmp_path, capsys):
    words = ["heal", str(pruned), "--teacher", str(pico_file), "-o", str(tmp_path / "h"), "--data", text]
    flags = ["--tokens", "256", "--batch", "4", "--seq-len", "32", "--held-out", "4", "--rank", "2", "-q"]
    assert main([*words, *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], said["tokens"], said["output"]) == (2, 256, str(tmp_path / "h"))
    assert open_checkpoint(tmp_path / "h").provenance["healing"][0]["rank"] == 2
    assert main([*words, *flags]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main([*words, *flags, "--force"]) == 0
    assert "2 steps on 256 tokens changed 8 tensors; held out: loss" in capsys.readouterr().out


def test_an_interrupt_says_what_goes_on(tmp_path):
    args = argparse.Namespace(output=str(tmp_path / "h"), work=None)
    written = Written(args)
    assert written.report() == "nothing was written"
    (tmp_path / "h.heal").mkdir()
    (tmp_path / "h.heal" / "state.pt").write_bytes(b"state")
    said = written.report()
    assert f"no model was written; the training so far is in {tmp_path / 'h.heal' / 'state.pt'}, and" in said
    assert "the same command with --resume goes on from there" in said
