"""`depthprune chat` over a pipe, and `depthprune env`."""

from __future__ import annotations

import io
import json

import pytest
import torch

from depthprune_runtime.cli import main


def chat(monkeypatch, capsys, path, said, *options) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    status = main(["chat", str(path), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "6", *options])
    out, err = capsys.readouterr()
    return status, out, err


def test_each_line_of_a_pipe_is_a_turn(pico_file, pico_runtime, monkeypatch, capsys):
    messages, expected = [{"role": "system", "content": "be brief"}], []
    for line in ("the quick", "a decoder"):
        messages.append({"role": "user", "content": line})
        text = pico_runtime.chat(messages, temperature=0, max_new_tokens=6).text
        messages.append({"role": "assistant", "content": text})
        expected.append(text)
    status, out, err = chat(monkeypatch, capsys, pico_file, "the quick\n\na decoder\n", "--system", "be brief")
    assert status == 0
    assert out == "".join(f"{text}\n" for text in expected)
    assert err.count("\n") == 1
    assert "tokens a second" in err


def test_a_conversation_begins_anew_and_ends(pico_file, monkeypatch, capsys):
    _, once, _ = chat(monkeypatch, capsys, pico_file, "the quick\n", "-q")
    status, out, err = chat(monkeypatch, capsys, pico_file, "the quick\n/reset\nthe quick\n/exit\nnever\n", "-q")
    assert (status, out, err) == (0, once + once, "")


def test_what_does_not_fit_is_one_line(pico_file, monkeypatch, capsys):
    status, _, err = chat(monkeypatch, capsys, pico_file, "the " * 400 + "\n")
    assert status == 1
    assert err.count("\n") == 1
    assert "shorten it" in err


def test_the_environment(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu_level"] in found["cpu_levels"]
    assert main(["env"]) == 0
    assert f"{found['cpu_level']} (of " in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--max-new-tokens=0", "--temperature=-1"])
def test_bad_options_of_a_chat_are_one_line(option, pico_file, monkeypatch, capsys):
    status, out, err = chat(monkeypatch, capsys, pico_file, "the\n", option)
    assert (status, out, err.count("\n")) == (1, "", 1)
