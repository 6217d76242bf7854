"""The example backend over a real socket: streaming, refusals, and a client that goes away."""

from __future__ import annotations

import http.client
import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from depthprune_runtime.engine.runner import Runner

uvicorn = pytest.importorskip("uvicorn")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "embed_backend.py"


@pytest.fixture(scope="module")
def backend():
    found = importlib.util.spec_from_file_location("embed_backend", EXAMPLE)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def serve(backend, pico_runtime):
    """Starts the app on a free port; gives the engine and a function that opens a connection."""
    servers = []

    def start(**options):
        engine = pico_runtime.engine(kv_memory=2_000_000, **options)
        server = uvicorn.Server(uvicorn.Config(backend.app(engine), host="127.0.0.1", port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return lambda: http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def post(connection, **body):
    connection.request("POST", "/generate", json.dumps(body))
    return connection.getresponse()


def stats(connect):
    connection = connect()
    connection.request("GET", "/stats")
    return json.loads(connection.getresponse().read())


def test_it_streams_what_generate_gives(serve, pico_runtime):
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    expected = pico_runtime.generate("the quick", **options)[0].outputs[0]
    answer = post(serve()(), prompt="the quick", **options)
    assert answer.status == 200
    events = [json.loads(line[6:]) for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert [t for e in events for t in e["token_ids"]] == list(expected.token_ids)
    assert "".join(e["text"] for e in events) == expected.text
    assert events[-1]["finish_reason"] == "length"
    assert len(events) == 12


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature: expected a number from 0 to 10000"),
        ({"prompt": "x", "heat": 1}, "heat"),
        ({"max_tokens": 3}, "prompt"),
        ({"prompt": [10**9]}, "expected token ids below"),
        ({"prompt": []}, "empty"),
        ({"prompt": 5}, "expected a string or a sequence of token ids"),
        ({"prompt": {"prompt_token_ids": [True]}}, "token ids"),
        ({"prompt": "a", "stop_token_ids": [2**63]}, "stop_token_ids: expected token ids below 384"),
        ({"prompt": "a", "n": 100_000}, "n: expected"),
        ({"prompt": "a", "priority": 2**80}, "priority: expected"),
        ({"prompt": "a\udcff"}, "expected Unicode text"),
    ],
)
def test_bad_requests_are_one_line(serve, body, message):
    answer = post(serve()(), **body)
    assert answer.status == 400
    text = json.loads(answer.read())["error"]
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("body", ["[" * 100_000, "[]", "5", "", "{", '{"prompt": "a", "seed": ' + "9" * 5000 + "}"])
def test_what_is_no_request_is_one_line(serve, body):
    connection = serve()()
    connection.request("POST", "/generate", body)
    answer = connection.getresponse()
    assert answer.status == 400
    assert "expected a JSON object" in json.loads(answer.read())["error"]


def test_a_body_has_a_limit(serve, backend):
    connection = serve()()
    connection.request("POST", "/generate", b" " * (backend.MAX_BODY + 1))
    answer = connection.getresponse()
    assert answer.status == 413
    assert "at most 4194304 bytes" in json.loads(answer.read())["error"]


def get(connect, path):
    connection = connect()
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_health_says_when_the_engine_is_dead(serve, pico_runtime, monkeypatch):
    connect = serve()
    assert get(connect, "/health") == (200, {"status": "ok"})

    def fail(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(Runner, "run", fail)
    answer = post(connect(), prompt="the quick")
    assert answer.status == 200
    assert "device lost" in answer.read().decode()
    for status, body in (get(connect, "/health"), get(connect, "/stats")):
        assert status == 503
        assert "device lost" in body["error"]
    answer = post(connect(), prompt="the quick")
    assert (answer.status, "device lost" in answer.read().decode()) == (503, True)


def test_a_signal_waits_for_what_runs_but_not_for_ever(pico_file):
    """A request of 400 000 tokens would run for minutes; the context of the model is widened for it."""
    code = (
        "import dataclasses, sys, runpy; from depthprune_runtime.engine import runtime as r; "
        "plain = r.Runtime.__init__\n"
        "def wide(self, checkpoint, *a, **k):\n"
        "    checkpoint.spec = dataclasses.replace(checkpoint.spec, max_position_embeddings=2**20)\n"
        "    plain(self, checkpoint, *a, **k)\n"
        "r.Runtime.__init__ = wide\n"
        f"sys.argv = ['x', {str(pico_file)!r}, '--port', '0', '--kv-memory', '1GB', '--drain', '1']\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    port = None
    for line in server.stderr:
        if "running on" in line:
            port = int(line.split("127.0.0.1:")[1].split()[0])
            break
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    answer = post(connection, prompt="the quick", max_tokens=400_000, ignore_eos=True)
    assert answer.status == 200
    answer.read(20)
    server.terminate()
    try:
        server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode is not None


def test_a_client_that_goes_away_frees_its_memory(serve):
    connect = serve()
    connection = connect()
    answer = post(connection, prompt="the quick", max_tokens=200, ignore_eos=True)
    answer.read(20)  # it runs
    answer.close()
    connection.close()
    deadline = time.monotonic() + 20
    while (found := stats(connect))["num_running"] + found["num_waiting"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found["num_free_kv_blocks"] == found["num_kv_blocks"]


def test_a_full_queue_says_so(serve):
    connect = serve(max_num_seqs=1, max_waiting=1)
    answers = [post(connect(), prompt="the quick", max_tokens=200, ignore_eos=True) for _ in range(12)]
    refused = [json.loads(a.read())["error"] for a in answers if a.status == 503]
    assert refused
    assert all("max_waiting" in text for text in refused)
    assert {a.status for a in answers} == {200, 503}
