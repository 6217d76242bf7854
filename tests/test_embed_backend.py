"""The example runs: the server's routes and one of its own."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "embed_backend.py"


def test_the_example_serves(pico_file, monkeypatch):
    made = []
    monkeypatch.setattr("uvicorn.run", lambda app, **options: made.append((app, options)))
    monkeypatch.setattr(sys, "argv", ["embed_backend.py", str(pico_file)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    ((app, options),) = made
    assert options["host"] == "127.0.0.1"
    with TestClient(app) as client:
        answer = client.post("/v1/completions", json={"prompt": "the quick", "max_tokens": 3, "ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert client.get("/stats").json()["num_output_tokens"] == 3


def test_a_bad_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["embed_backend.py", str(tmp_path / "nothing.safetensors")])
    with pytest.raises(SystemExit, match=r"^embed_backend: "):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
