"""The command line: JSON for machines, one line for mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pico
import pytest

from depthprune_runtime.cli import main
from depthprune_runtime.engine.outputs import CompletionOutput, RequestOutput

SMALL = ["--samples", "4", "--seq-len", "32"]


def run(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()  # what fixtures printed
    try:
        status = main([str(a) for a in args])
    except SystemExit as stop:  # argparse: usage errors, --help
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def one_line(capsys, *args, status=1) -> str:
    """The message of a command that must fail: one line, no traceback, nothing on stdout."""
    code, out, err = run(capsys, *args)
    assert (code, out) == (status, "")
    assert err.count("\n") == 1, err
    return err


@pytest.fixture
def pruned(pico_file, tmp_path, capsys):
    path = tmp_path / "pruned.safetensors"
    status, out, err = run(capsys, "prune", pico_file, "-o", path, "--blocks", 2, "--json", "-q", *SMALL)
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["plan"]["method"] == "shortgpt"
    assert (report["sublayers"], report["parent_sublayers"]) == (8, 12)
    return path


def test_prune_shows_progress_and_a_summary(pico_file, tmp_path, capsys):
    status, out, err = run(capsys, "prune", pico_file, "-o", tmp_path / "p", "--sparsity", 0.2, *SMALL)
    assert status == 0
    assert "shortgpt (drop 4)" in out
    assert "score blocks" in err


def test_inspect(pruned, capsys):
    status, out, _ = run(capsys, "inspect", pruned, "--json")
    report = json.loads(out)
    assert status == 0
    assert {"spec", "plan", "provenance", "parameters", "bytes_per_token", "sublayers"} <= set(report)
    assert [set(s) for s in report["sublayers"]] == [{"index", "kind", "origin", "widths", "parameters", "bits"}] * 8
    assert report["sublayers"][0]["widths"] == {"num_heads": 9, "num_kv_heads": 3, "head_dim": 16}
    gone = {e["sublayer"] // 2 for e in report["plan"]["edits"]}
    expected = "".join("." if b in gone else "#" for b in range(6))
    status, out, _ = run(capsys, "inspect", pruned)
    assert f"attention {expected}\n" in out
    assert f"ffn       {expected}\n" in out
    assert f"{report['parameters']:,}" in out


def test_inspect_reads_sources_too(pico_llama, capsys):
    status, out, _ = run(capsys, "inspect", pico_llama[1])
    assert status == 0
    assert "none: dense" in out


def test_generate(pruned, capsys):
    status, out, _ = run(capsys, "generate", pruned, "-p", "the quick", "--max-new-tokens", 6, "--json")
    assert status == 0
    report = json.loads(out)[0]
    assert set(report) == set(RequestOutput.__dataclass_fields__)
    assert set(report["outputs"][0]) == set(CompletionOutput.__dataclass_fields__)
    status, streamed, _ = run(capsys, "generate", pruned, "-p", "the quick", "--max-new-tokens", 6)
    assert streamed == report["outputs"][0]["text"] + "\n"
    options = ["--temperature", 1, "--seed", 1, "-n", 2, "--top-k", 9, "--logprobs", 1, "--max-new-tokens", 4]
    status, out, _ = run(capsys, "generate", pruned, "-p", "a", "-p", "the", "--json", *options)
    assert [len(r["outputs"]) for r in json.loads(out)] == [2, 2]
    status, out, _ = run(capsys, "generate", pruned, "--chat", "-p", "hello", "--json", "--max-new-tokens", 2)
    assert "<|assistant|>" in json.loads(out)[0]["prompt"]


def test_perplexity(pruned, capsys):
    args = ["perplexity", pruned, "--text", "builtin-test", "--seq-len", 64, "--windows", 3]
    status, out, _ = run(capsys, *args, "--json")
    report = json.loads(out)
    assert status == 0
    assert set(report) == {"perplexity", "tokens", "windows", "seq_len"}
    assert (report["tokens"], report["windows"], report["seq_len"]) == (3 * 63, 3, 64)
    _, out, _ = run(capsys, *args)
    assert f"perplexity {report['perplexity']:.4f}" in out


def test_import(pico_llama, pico_file, tmp_path, capsys):
    status, out, _ = run(capsys, "import", pico_llama[1], "-o", tmp_path / "d", "--json", "-q")
    assert status == 0
    assert json.loads(out)["parameters"] > 0
    assert (tmp_path / "d").read_bytes() == pico_file.read_bytes()


def test_mistakes_with_files(pico_llama, pico_file, tmp_path, capsys):
    data = bytearray(pico_file.read_bytes())
    (tmp_path / "cut").write_bytes(data[:-9])
    data[len(data) // 2] ^= 4
    (tmp_path / "flip").write_bytes(data)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9" * 999)
    (tmp_path / "short.txt").write_text("too little")
    bare = pico.save(pico_llama[0], tmp_path / "bare", tokenizer=False)
    (bare / "note").write_text("x")
    prune = ["prune", pico_file, "-o", tmp_path / "out", "--blocks", 1, "-q", *SMALL]
    assert "truncated" in one_line(capsys, "inspect", tmp_path / "cut")
    assert "damaged" in one_line(capsys, "generate", tmp_path / "flip", "-p", "x")
    assert "no such file" in one_line(capsys, "inspect", tmp_path / "none")
    assert "not UTF-8" in one_line(capsys, *prune, "--calibration", tmp_path / "latin1.txt")
    assert "too short" in one_line(capsys, *prune, "--calibration", tmp_path / "short.txt")
    assert "text is too short" in one_line(capsys, "perplexity", pico_file, "--text", tmp_path / "short.txt", "-q",
                                           "--seq-len", 64)  # fmt: skip
    assert "at most the model's context" in one_line(capsys, "perplexity", pico_file, "--text", "builtin-test")
    assert "does not exist" in one_line(capsys, *prune[:3], tmp_path / "no" / "out", *prune[4:])
    assert "regular file" in one_line(capsys, *prune[:3], "/dev/full", *prune[4:])
    assert not (tmp_path / "out").exists()


def test_mistakes_with_values(pico_llama, pico_file, tmp_path, capsys):
    prune = ["prune", pico_file, "-o", tmp_path / "out", "-q", *SMALL]
    assert "the most is" in one_line(capsys, *prune, "--sparsity", 0.97)
    assert "below 1" in one_line(capsys, *prune, "--sparsity", 1.5)
    assert "expected 0 to 5" in one_line(capsys, *prune, "--blocks", 6)
    assert "required" in one_line(capsys, *prune, status=2)
    assert "invalid choice" in one_line(capsys, *prune, "--blocks", 1, "--method", "magic", status=2)
    assert "arguments are required" in one_line(capsys, "-q", status=2)
    generate = ["generate", pico_file]
    assert "at least one" in one_line(capsys, *generate)
    assert "at most 255 tokens" in one_line(capsys, *generate, "-p", "word " * 300)
    assert "temperature" in one_line(capsys, *generate, "-p", "x", "--temperature", -1)
    assert "device" in one_line(capsys, *generate, "-p", "x", "--device", "toaster")
    assert "dtype" in one_line(capsys, *generate, "-p", "x", "--dtype", "int3")


def test_an_empty_prompt_needs_a_bos(pico_file, pico_llama, tmp_path, capsys):
    """With a BOS an empty prompt is a prompt; without one there is nothing to start from."""
    status, _, _ = run(capsys, "generate", pico_file, "-p", "", "--max-new-tokens", 2)
    assert status == 0
    folder = pico.save(pico_llama[0], tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    assert "prompt: empty" in one_line(capsys, "generate", folder, "-p", "", "--max-new-tokens", 2)


def test_missing_tokenizer(pico_llama, tmp_path, capsys):
    folder = pico.save(pico_llama[0], tmp_path / "m", tokenizer=False)
    _, _, err = run(capsys, "prune", folder, "-o", tmp_path / "o", "--blocks", 1, "-q")
    assert "carries no tokenizer" in err
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


def command(*args, **options) -> subprocess.Popen:
    # A shell's background job (`make test &`) ignores SIGINT, and would hand that down.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "depthprune_runtime.cli", *map(str, args)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_leaves_nothing(pico_file, tmp_path, sent):
    process = command("prune", pico_file, "-o", tmp_path / "out", "--blocks", 1, "--samples", 600, "--seq-len", 128)
    seen = b""
    fd = process.stderr.fileno()
    deadline = time.monotonic() + 90
    while b"score blocks" not in seen and time.monotonic() < deadline:
        seen += os.read(fd, 4096)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.rstrip().endswith("depthprune: interrupted; nothing was written")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_quiet(pico_file):
    process = command("inspect", pico_file, "--json")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert err == ""


def test_finercut_resumes_and_is_drawn(pico_file, tmp_path, capsys):
    args = ["prune", pico_file, "--method", "finercut", "--state", tmp_path / "state.json", "-q", *SMALL]
    assert run(capsys, *args, "-o", tmp_path / "a", "--sublayers", 2)[0] == 0
    status, out, err = run(capsys, *args, "-o", tmp_path / "b", "--sublayers", 3, "--repair", "none", "--json")
    assert (status, err) == (0, "")
    ranking = json.loads(out)["plan"]["settings"]["ranking"]
    assert [r["step"] for r in ranking] == [1, 2, 3]
    picture = tmp_path / "map.png"
    status, out, _ = run(capsys, "inspect", tmp_path / "b", "--plot", picture)
    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert out.count(".") >= 3
    assert ".png" in one_line(capsys, "inspect", tmp_path / "b", "--plot", tmp_path / "map.txt")


def test_flattengpt_is_inspected(pico_file, tmp_path, capsys):
    path = tmp_path / "f"
    assert run(capsys, "prune", pico_file, "-o", path, "--method", "flattengpt", "--blocks", 1, "-q", *SMALL)[0] == 0
    report = json.loads(run(capsys, "inspect", path, "--json")[1])
    assert sorted(e["kind"] for e in report["plan"]["edits"]) == ["flatten", "narrow", "narrow"]
    assert report["plan"]["settings"]["repair"]["lam"] > 0
    assert "22" in run(capsys, "inspect", path)[1]


def test_options_of_another_method_are_refused(pico_file, tmp_path, capsys):
    prune = ["prune", pico_file, "-o", tmp_path / "out", "--blocks", 1, "-q", *SMALL]
    assert "method shortgpt: unknown options" in one_line(capsys, *prune, "--distance", "kl")
    assert "none takes no options" in one_line(capsys, *prune, "--repair", "none", "--repair-lam", 1)
    assert "only finercut" in one_line(capsys, "prune", pico_file, "-o", tmp_path / "out", "--sublayers", 1, "-q")


def test_the_strength_of_the_repair_reaches_the_plan(pico_file, tmp_path, capsys):
    prune = ["prune", pico_file, "-o", tmp_path / "out", "--blocks", 1, "-q", *SMALL]
    assert "repair strength: expected a number from" in one_line(capsys, *prune, "--repair-strength", 2)
    assert not (tmp_path / "out").exists()
    status, out, _ = run(capsys, *prune, "--json", "--repair-strength", 0.75)
    assert (status, json.loads(out)["plan"]["settings"]["repair"]["strength"]) == (0, 0.75)


@pytest.mark.parametrize(("method", "strength"), [("shortgpt", 1.0), ("finercut", 0.6), ("flattengpt", 1.0)])
def test_a_method_has_its_own_strength_of_the_repair(pico_file, tmp_path, capsys, method, strength):
    prune = ["prune", pico_file, "-o", tmp_path / "out", "--blocks", 1, "-q", *SMALL, "--method", method, "--json"]
    status, out, _ = run(capsys, *prune)
    assert (status, json.loads(out)["plan"]["settings"]["repair"]["strength"]) == (0, strength)
    status, out, _ = run(capsys, *prune, "--repair-strength", 0.5, "--force")
    assert (status, json.loads(out)["plan"]["settings"]["repair"]["strength"]) == (0, 0.5)


def test_mamba_becomes_a_folder(tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=pico.VOCAB_SIZE, hidden_size=16, num_hidden_layers=4, state_size=4)
    torch.manual_seed(0)
    folder = pico.save(AutoModelForCausalLM.from_config(config), tmp_path / "mamba")
    args = ["prune", folder, "-o", tmp_path / "out", "--blocks", 1, "-q", *SMALL]
    status, out, _ = run(capsys, *args, "--json")
    assert status == 0
    assert len(json.loads(out)["dropped"]) == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert "only be pruned by shortgpt" in one_line(capsys, *args, "--method", "flattengpt")
