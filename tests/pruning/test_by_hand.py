"""Plans replayed and written by hand, layers named by hand, and models that are pruned more than once."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from specs import mixed_spec, plain_spec

from depthprune_runtime import FinerCutOptions, FlattenGPTOptions, InputError, Runtime, prune
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.cli import main
from depthprune_runtime.inspection.describe import inspect, render
from depthprune_runtime.inspection.picture import plot_map
from depthprune_runtime.pruning.by_hand import parse_drop, read_plan
from depthprune_runtime.pruning.plan import Drop, Flatten, Narrow, PrunePlan

SMALL = {"samples": 4, "seq_len": 32}
IDS = list(range(2, 40))


def numbers(text, blocks=30):
    return [drop.sublayer for drop in parse_drop(text, plain_spec(blocks))]


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("7", [14, 15]),
        ("21-23", [42, 43, 44, 45, 46, 47]),
        ("5.attention,7.ffn", [10, 15]),
        (" 2.ffn , 0-1.attention", [0, 2, 5]),
        ("29", [58, 59]),
    ],
)
def test_layers_by_hand(text, gone):
    assert numbers(text) == gone


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30", "expected blocks from 0 to 29, got 30"),
        ("28-30", "expected blocks from 0 to 29, got 28-30"),
        ("9-7", "expected blocks from 0 to 29, got 9-7"),
        ("3,2-4", "the attention of block 3 is named twice"),
        ("3.ffn,3", "the ffn of block 3 is named twice"),
        ("", "expected blocks such as 21-28"),
        ("-1", "expected blocks such as 21-28"),
        ("5.norm", "expected blocks such as 21-28"),
        ("٣", "expected blocks such as 21-28"),
    ],
)
def test_layers_that_are_not_there(text, message):
    with pytest.raises(InputError, match=message):
        numbers(text)


def test_blocks_that_lost_a_half_have_no_number():
    with pytest.raises(InputError, match="its blocks have no numbers"):
        parse_drop("1", mixed_spec())


def test_dropping_by_hand_is_what_it_says(pico_file, tmp_path):
    result = prune(pico_file, tmp_path / "p", drop="2,4.attention", repair="none")
    assert result.plan == PrunePlan(
        "by-hand", open_checkpoint(pico_file).digest(), (Drop(4), Drop(5), Drop(8)), {"drop": "2,4.attention"}
    )
    dense = open_checkpoint(pico_file)
    pruned = open_checkpoint(tmp_path / "p")
    kept = [0, 1, 2, 3, 6, 7, 9, 10, 11]
    assert len(pruned.spec.sublayers) == len(kept)
    for new, old in enumerate(kept):
        for name in dense.spec.sublayer_shapes(old):
            short = name.split(".", 2)[2]
            assert pruned.tensor(f"sublayers.{new}.{short}").equal(dense.tensor(name))


def test_a_repair_follows_layers_by_hand(pico_file, tmp_path):
    prune(pico_file, tmp_path / "plain", drop="2", repair="none")
    result = prune(pico_file, tmp_path / "mended", drop="2", **SMALL)
    assert result.plan.settings["repair"]["samples"] == 4
    plain, mended = (open_checkpoint(tmp_path / name).checksums() for name in ("plain", "mended"))
    changed = {name for name in plain if plain[name] != mended[name]}
    assert changed == {f"sublayers.{i}.{'o' if i % 2 == 0 else 'down'}_proj.weight" for i in range(3, 10)}


def test_no_text_is_needed_where_nothing_is_repaired(pico_llama, tmp_path):
    import pico

    folder = pico.save(pico_llama[0], tmp_path / "model", tokenizer=False)
    prune(folder, tmp_path / "p", drop="1", repair="none", calibration="/nowhere.txt")
    assert len(open_checkpoint(tmp_path / "p").spec.sublayers) == 10


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("shortgpt", {"blocks": 2}),
        ("finercut", {"sublayers": 3, "options": FinerCutOptions(distance="angular")}),
        ("flattengpt", {"blocks": 2, "options": FlattenGPTOptions(keep_width=0.5)}),
    ],
)
def test_a_plan_replayed_gives_the_same_model(pico_file, tmp_path, capsys, method, options):
    """From what `inspect --json` prints. Of flattengpt narrowed units are in the plan, so nothing is decided again."""
    first = prune(pico_file, tmp_path / "first", method, **options, **SMALL)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "first"), "--json"]) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    again = prune(pico_file, tmp_path / "again", plan=tmp_path / "plan.json", **SMALL)
    assert again.plan.edits == first.plan.edits
    assert (again.plan.method, again.plan.settings["repair"]) == (method, first.plan.settings["repair"])
    expected, found = (open_checkpoint(tmp_path / name) for name in ("first", "again"))
    assert found.spec == expected.spec
    if method != "flattengpt":  # which solves a merged projection and narrows it in one system
        assert found.checksums() == expected.checksums()
    unrepaired = prune(pico_file, tmp_path / "plain", plan=first.plan, repair="none")
    assert "repair" not in unrepaired.plan.settings and unrepaired.spec == first.spec


def test_a_plan_by_hand_needs_edits_only(pico_file, tmp_path):
    edits = [{"kind": "flatten", "blocks": [1, 2]}, {"kind": "narrow", "sublayer": 2, "keep": [0, 4]}]
    (tmp_path / "plan.json").write_text(json.dumps({"edits": edits}))
    result = prune(pico_file, tmp_path / "p", plan=str(tmp_path / "plan.json"), repair="none")
    assert result.plan.edits == (Flatten((1, 2)), Narrow(2, (0, 4)))
    assert (result.plan.method, result.plan.parent_digest) == ("by-hand", open_checkpoint(pico_file).digest())
    assert [s.origin for s in result.spec.attention_sublayers()] == [(0,), (1, 2), (3,), (4,), (5,)]
    assert result.spec.attention_sublayers()[1].num_kv_heads == 2


def plan_of(*edits, digest=""):
    return PrunePlan("by-hand", digest, edits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": plan_of(Drop(12))}, "drop of sub-layer 12, but the parent has 12 sub-layers"),
        ({"plan": plan_of(Drop(3), Drop(3))}, "sub-layer 3 is dropped twice"),
        ({"plan": plan_of(Flatten((1, 2)), Drop(2))}, "sub-layer 2 is dropped twice or both dropped and merged"),
        ({"plan": plan_of(Narrow(2, (7,)))}, "keeps unit 7 of 3"),
        ({"plan": plan_of(Drop(0), digest="0" * 64)}, "made for another model, of digest 0000000000000"),
        ({"drop": "0-5"}, "it drops every sub-layer"),
        ({"drop": "6"}, "expected blocks from 0 to 5, got 6"),
        ({"drop": "1", "blocks": 1}, "drop: it says all that goes; leave out blocks"),
        ({"drop": "1", "method": "shortgpt"}, "leave out method"),
        ({"plan": plan_of(Drop(0)), "drop": "1"}, "plan: it says all that goes; leave out drop"),
        ({"plan": "/nowhere.json"}, "plan /nowhere.json: no such file"),
        ({"drop": 3}, "drop: expected a text such as 21-28, got 3"),
    ],
)
def test_plans_that_do_not_fit_write_nothing(pico_file, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        prune(pico_file, tmp_path / "p", **arguments, repair="none")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "plan.json"),
        ("[]", "plan.json"),
        ("{}", "expected an object with edits"),
        ('{"plan": null}', "expected an object with edits"),
        ('{"edits": [{"kind": "melt"}]}', r"plan.edits\[0\]: expected a kind out of"),
        ('{"edits": [{"kind": "drop", "sublayer": -1}]}', "rising integers"),
        ('{"edits": [], "blocks": 3}', "unknown keys"),
    ],
)
def test_files_that_hold_no_plan(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_plan(tmp_path / "plan.json")
    assert str(tmp_path) in str(caught.value)


def test_a_pruned_file_is_pruned_again(pico_file, tmp_path):
    """Numbers are those of the file that is pruned; the chain of plans stays in it."""
    first = prune(pico_file, tmp_path / "p", blocks=1, **SMALL).plan
    second = prune(tmp_path / "p", tmp_path / "q", plan=plan_of(Flatten((1, 2))), repair="none")
    third = prune(tmp_path / "q", tmp_path / "r", drop="1,0.ffn", repair="none")
    found = open_checkpoint(tmp_path / "r")
    assert found.plan == third.plan.to_json()
    assert found.provenance["plans"] == [first.to_json(), second.plan.to_json()]
    assert second.plan.parent_digest == open_checkpoint(tmp_path / "p").digest()
    middle, last = (open_checkpoint(tmp_path / name).spec for name in ("q", "r"))
    assert last.sublayers == (middle.sublayers[0], *middle.sublayers[4:])
    assert torch.isfinite(Runtime.load(tmp_path / "r", device="cpu").logits(IDS)).all()
    text = render(inspect(found)).splitlines()
    assert [line.split(":")[0].split() for line in text if line.startswith(("first", "then", "plan "))] == [
        ["first", "shortgpt"],
        ["then", "by-hand"],
        ["plan", "by-hand"],
    ]
    plot_map(inspect(found), tmp_path / "map.png")


def test_methods_prune_a_pruned_file(pico_file, tmp_path):
    prune(pico_file, tmp_path / "p", drop="1", repair="none")
    expected = prune(pico_file, tmp_path / "both", drop="1,3", repair="none").spec
    options = FinerCutOptions(front_protection=0.0, distance="angular")
    prune(tmp_path / "p", tmp_path / "q", "finercut", sublayers=1, options=options, **SMALL)
    again = prune(tmp_path / "p", tmp_path / "r", blocks=1, **SMALL)
    assert len(open_checkpoint(tmp_path / "q").spec.sublayers) == 9
    assert len(again.spec.sublayers) == len(expected.sublayers) == 8
    plot_map(inspect(open_checkpoint(tmp_path / "r")), tmp_path / "map.svg")


def test_a_depth_that_no_chain_tells_of_is_refused(pico_file, tmp_path):
    prune(pico_file, tmp_path / "p", drop="1", repair="none")
    prune(tmp_path / "p", tmp_path / "q", drop="1", repair="none")
    from depthprune_runtime.checkpoint import write_native

    checkpoint = open_checkpoint(tmp_path / "q")
    checkpoint.provenance = {**checkpoint.provenance, "plans": []}
    with pytest.raises(InputError, match="spec and plan tell of 10 sub-layers only"):
        write_native(tmp_path / "r", checkpoint)


def test_the_command_line(pico_file, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({"edits": [dataclasses.asdict(Drop(3)) | {"kind": "drop"}]}))
    source, plan = str(pico_file), str(tmp_path / "plan.json")
    assert main(["prune", source, "-o", str(tmp_path / "p"), "--plan", plan, "--repair", "none", "-q"]) == 0
    assert main(["prune", source, "-o", str(tmp_path / "q"), "--drop", "1.ffn", "--repair", "none", "-q"]) == 0
    assert open_checkpoint(tmp_path / "p").checksums() == open_checkpoint(tmp_path / "q").checksums()
    assert "by-hand (drop 1)" in capsys.readouterr().out
    assert main(["prune", source, "-o", str(tmp_path / "r"), "--drop", "1", "--score", "reverse"]) == 1
    assert "drop: no method decides, so it takes no score" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["prune", source, "-o", str(tmp_path / "r"), "--drop", "1", "--blocks", "2"])
