"""The example backend over a real socket: streaming, refusals, and a client that goes away."""

from __future__ import annotations

import http.client
import importlib.util
import json
import threading
import time
from pathlib import Path

import pytest

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
    ],
)
def test_bad_requests_are_one_line(serve, body, message):
    answer = post(serve()(), **body)
    assert answer.status == 400
    text = json.loads(answer.read())["error"]
    assert message in text
    assert "\n" not in text


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
