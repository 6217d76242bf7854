"""A method is a file of its own and a line in the registry: this file holds one, and only that line is added."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from depthprune_runtime import InputError, prune
from depthprune_runtime.cli import build_parser, main
from depthprune_runtime.options import check_count, flag, flags
from depthprune_runtime.pruning.amount import block_pairs
from depthprune_runtime.pruning.method import METHODS, Method, MethodOptions, all_methods, load_method
from depthprune_runtime.pruning.plan import Drop, PrunePlan

PACKAGE = Path(importlib.util.find_spec("depthprune_runtime").origin).parent
SMALL = {"samples": 4, "seq_len": 32}
SMALL_FLAGS = ["--samples", "4", "--seq-len", "32", "-q"]


@dataclass(frozen=True)
class ToyOptions(MethodOptions):
    every: int = field(default=1, metadata=flag("drop every N-th block", name="toy_every", metavar="N"))
    backwards: bool = field(default=False, metadata=flag("from the last block on"))
    log: str | None = field(default=None, metadata=flag("what was dropped", name="toy_log", writes=True))

    def __post_init__(self) -> None:
        check_count("every", self.every)


class Toy(Method[ToyOptions]):
    name = "toy"
    options = ToyOptions
    repair_strength = 0.25

    def windows(self, options):
        return 3, 16

    def check(self, amount, spec, options):
        if amount.block_count(spec) * options.every > len(block_pairs(spec)):
            raise InputError("every: so many blocks are not there")

    def decide(self, task, options):
        pairs = block_pairs(task.parent.spec)[:: -1 if options.backwards else 1]
        gone = pairs[:: options.every][: task.amount.block_count(task.parent.spec)]
        if options.log is not None:
            Path(options.log).write_text(str(gone))
        settings = {"every": options.every, "calibration": task.calibration.description}
        return PrunePlan(self.name, task.digest, tuple(Drop(i) for pair in sorted(gone) for i in pair), settings)


METHOD = Toy()


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", __name__)


@pytest.mark.usefixtures("toy")
def test_a_new_method_prunes(pico_file, tmp_path):
    result = prune(pico_file, tmp_path / "p", blocks=2, options=ToyOptions(every=2), **SMALL)
    assert result.plan.method == "toy"
    assert result.plan.dropped() == {0, 1, 4, 5}
    assert len(result.spec.sublayers) == 8
    assert result.plan.settings["repair"]["strength"] == 0.25
    by_name = prune(pico_file, tmp_path / "q", "toy", blocks=1, repair="none")
    assert by_name.plan.dropped() == {0, 1}
    assert by_name.plan.settings["calibration"]["samples"] == 3
    with pytest.raises(InputError, match="every: so many"):
        prune(pico_file, tmp_path / "r", blocks=3, options=ToyOptions(every=5), **SMALL)
    with pytest.raises(InputError, match="only finercut drops single sub-layers, toy needs blocks or sparsity"):
        prune(pico_file, tmp_path / "r", "toy", sublayers=3, **SMALL)
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("toy")
def test_a_new_method_has_its_flags(pico_file, tmp_path, capsys):
    log = tmp_path / "log"
    command = ["prune", str(pico_file), "-o", str(tmp_path / "p"), "--blocks", "1", *SMALL_FLAGS, "--repair", "none"]
    assert main([*command, "--method", "toy", "--backwards", "--toy-log", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["edits"] == [{"kind": "drop", "sublayer": i} for i in (10, 11)]
    assert log.read_text() == "((10, 11),)"
    for more, message in (
        (["--toy-every", "2"], "method shortgpt: unknown options ['every']; known are ['protect_last', 'score']"),
        (["--method", "toy", "--toy-every", "0"], "every: expected an integer from 1 on, got 0"),
        (["--method", "toy", "--force", "--toy-log", str(pico_file)], "which this job reads"),
    ):
        assert main([*command, *more]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    told = capsys.readouterr().out
    assert "{shortgpt,finercut,flattengpt,toy}" in told
    assert "drop every N-th block" in told


def test_without_its_line_it_is_not_there(pico_file, tmp_path):
    with pytest.raises(InputError, match="method: expected one of shortgpt, finercut, flattengpt, got 'toy'"):
        prune(pico_file, tmp_path / "p", "toy", blocks=1)
    with pytest.raises(InputError, match=r"options: expected one of .*FinerCutOptions.*, got ToyOptions"):
        prune(pico_file, tmp_path / "p", blocks=1, options=ToyOptions())
    assert build_parser().parse_args(["prune", "m", "-o", "o", "--blocks", "1"]).repair == "auto"


def test_what_the_registry_holds():
    for name in METHODS:
        method = load_method(name)
        assert method.name == name
        assert [one.name for one, _ in flags(method.options)] == [f.name for f in dataclasses.fields(method.options)]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method.options(), dataclasses.fields(method.options)[0].name, None)
    assert tuple(method.name for method in all_methods()) == tuple(METHODS)


@pytest.mark.parametrize("path", ["pruning/prune.py", "pruning/rebuild.py", "cli/prune.py", "cli/flags.py"])
def test_what_is_above_the_methods_knows_none_of_them(path):
    kinds = {method.options.__name__ for method in all_methods()} | set(METHODS)
    tree = ast.parse((PACKAGE / path).read_text())
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    named |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not named & kinds
