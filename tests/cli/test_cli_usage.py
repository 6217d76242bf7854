"""Mistakes at the command line: found before the work, named by what was typed, and told truthfully."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import subprocess
import sys
import time

import pytest

from depthprune_runtime import InputError, RepairOptions, prune
from depthprune_runtime.cli import main
from depthprune_runtime.cli.common import print_json, show
from depthprune_runtime.cli.interrupt import Written
from depthprune_runtime.pruning.method import all_methods

SMALL = ["--samples", "4", "--seq-len", "32", "-q"]


def one_line(capsys, *args, status=1) -> str:
    capsys.readouterr()
    try:
        found = main([str(a) for a in args])
    except SystemExit as stop:
        found = stop.code
    out, err = capsys.readouterr()
    assert (found, out, err.count("\n")) == (status, "", 1), err
    assert err.rstrip("\n").isprintable()
    return err


@pytest.fixture
def nothing_is_scored(monkeypatch):
    for name in ("_rebuild", "write"):
        monkeypatch.setattr(f"depthprune_runtime.pruning.prune.{name}", None)
    for method in all_methods():
        monkeypatch.setattr(type(method), "decide", None)


def test_an_unknown_option_is_named_before_what_it_leaves_out(pico_file, tmp_path, capsys):
    command = ["prune", pico_file, "-o", tmp_path / "out"]
    err = one_line(capsys, *command, "--sparsty", 0.2, status=2)
    assert "unknown option --sparsty; did you mean --sparsity?" in err
    assert "--sparsty;" in one_line(capsys, *command, "--sparsty=0.2", status=2)
    assert "--zzz (see" in one_line(capsys, *command, "--blocks", 1, "--zzz", status=2)
    assert "--quick" in one_line(capsys, "--quick", "prune", status=2)
    assert "required" in one_line(capsys, *command, status=2)
    assert "invalid choice: 'prun'" in one_line(capsys, "prun", "--sparsty", status=2)
    assert list(tmp_path.iterdir()) == []


def test_abbreviations_and_values_with_dashes_still_work(pico_file, capsys):
    args = ["generate", str(pico_file), "--max-new", "2", "--json", "-p", "--a prompt with dashes", "--stop=--x"]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)[0]["prompt"] == "--a prompt with dashes"


def test_the_package_is_a_command():
    for module in ("depthprune_runtime", "depthprune_runtime.cli"):
        command = [sys.executable, "-m", module, "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stdout.split()[0]) == (0, "depthprune"), done.stderr


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert {"prune", "quantize", "generate"} <= set(out.split())


def test_other_formats_are_refused_before_the_work(pico_file, tmp_path, capsys, nothing_is_scored):
    for command in (["prune", "--blocks", 1], ["quantize"], ["import"]):
        err = one_line(capsys, command[0], pico_file, "-o", tmp_path / "x.gguf", *command[1:])
        assert "not .gguf; give a name that ends in .safetensors" in err


def test_a_text_too_short_for_the_repair_is_refused_before_the_scoring(pico_file, tmp_path, capsys, nothing_is_scored):
    command = ["prune", pico_file, "-o", tmp_path / "out", "--blocks", 1, *SMALL]
    assert "too short" in one_line(capsys, *command, "--repair-samples", 10**6)
    assert "seq_len: expected at most the model's context" in one_line(capsys, *command, "--repair-seq-len", 10**6)
    for value in (0, -1):
        assert "samples: expected an integer from 1 on" in one_line(capsys, *command, "--repair-samples", value)
        assert "samples: expected an integer from 1 on" in one_line(capsys, *command, "--samples", value)


def test_the_repair_may_have_windows_of_its_own(pico_file, tmp_path, capsys):
    command = ["prune", str(pico_file), "--score", "block-influence", "--blocks", "1", *SMALL, "--json"]

    def windows(name, *options):
        assert main([*command, "-o", str(tmp_path / name), *options]) == 0
        settings = json.loads(capsys.readouterr().out)["plan"]["settings"]
        scored, repair = settings["calibration"], settings["repair"]
        assert (repair["samples"], repair["seq_len"]) == tuple(repair["calibration"][n] for n in ("samples", "seq_len"))
        return (scored["samples"], scored["seq_len"]), (repair["samples"], repair["seq_len"])

    assert windows("a") == ((4, 32), (4, 32))
    assert windows("b", "--repair-samples", "9") == ((4, 32), (9, 32))
    assert windows("c", "--repair-samples", "9", "--repair-seq-len", "16") == ((4, 32), (9, 16))
    result = prune(pico_file, tmp_path / "d", blocks=1, repair=RepairOptions(samples=6), samples=4, seq_len=32)
    assert result.plan.settings["repair"]["calibration"]["samples"] == 6


@pytest.mark.parametrize("text", [["text"], None, 5, b"builtin"])
def test_a_calibration_that_is_no_name(pico_file, tmp_path, text):
    with pytest.raises(InputError, match="text: expected a name or a path"):
        prune(pico_file, tmp_path / "out", blocks=1, calibration=text)


def test_options_that_mean_nothing_for_mamba_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    command = ["prune", tmp_path, "-o", tmp_path / "out", "--blocks", 1]
    assert "shortgpt: unknown options ['distance']" in one_line(capsys, *command, "--distance", "kl")
    assert "only be pruned by shortgpt, got finercut" in one_line(capsys, *command, "--method", "finercut")
    for repair in (["--repair-lam", 1], ["--repair", "ridge"]):
        assert "take no option repair:" in one_line(capsys, *command, *repair)
    assert "take no option overwrite (--force)" in one_line(capsys, *command, "--force")
    assert "take no option max_shard_size" in one_line(capsys, *command, "--max-shard-size", "1GB")
    assert "not made of attention and FFN" in one_line(capsys, *command[:-2], "--sublayers", 1)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json" in one_line(capsys, *command)


def test_a_name_with_escapes_is_shown_without_them(tmp_path, capsys):
    err = one_line(capsys, "inspect", tmp_path / "x\x1b]0;owned\x07\u202e\n")
    assert "\\x1b]0;owned\\x07" in err
    assert len(one_line(capsys, "inspect", "x" * 100_000)) < 2100


def test_what_is_printed_never_moves_the_cursor(capsys):
    show("a\x1b[2Jb\nc\u202ed\re")
    print_json({"a\x9b": "\u200d🙂\x7f\ud800"})
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert out.startswith("a\\x1b[2Jb\nc\\u202ed\\re\n")
    assert json.loads(out.partition("\n{")[1] + out.partition("\n{")[2]) == {"a\x9b": "\u200d🙂\x7f\ud800"}
    assert "🙂" in out


def test_log_lines_are_printable_too(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def run(args):
        logging.getLogger("depthprune_runtime").warning("%s: odd", "name\x1b[2J\nline")

    monkeypatch.setattr("depthprune_runtime.cli.use._inspect", run)
    assert main(["inspect", "x"]) == 0
    assert capsys.readouterr().err == "depthprune: name\\x1b[2J\\nline: odd\n"


def interrupted(*args, when) -> str:
    """The last line of a command that gets SIGINT as soon as `when()` is true."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = [sys.executable, "-m", "depthprune_runtime", *map(str, args)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, inherited)
    deadline = time.monotonic() + 120
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return err.rstrip().splitlines()[-1]


def test_an_interrupted_search_says_where_it_is(pico_file, tmp_path):
    state = tmp_path / "state.json"
    command = ["prune", pico_file, "-o", tmp_path / "out", "--method", "finercut", "--sublayers", 10, "--state", state]
    said = interrupted(*command, "--samples", 400, "--seq-len", 64, "-q", when=state.exists)
    assert f"no model was written; the search so far is in {state}" in said
    assert list(tmp_path.iterdir()) == [state]


def test_what_was_written_is_told(tmp_path):
    paths = {"output": str(tmp_path / "out"), "state": str(tmp_path / "state"), "plot": None}
    (tmp_path / "state").write_text("old")
    written = Written(argparse.Namespace(**paths))
    assert written.report() == "nothing was written"
    (tmp_path / "state").write_text("newer")
    assert "search so far" in written.report()
    shutil.copy(tmp_path / "state", tmp_path / "out")
    assert written.report() == f"{tmp_path / 'out'} was already written"
