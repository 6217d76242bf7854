"""A server process and what goes wrong: bad bodies, clients that go away, a full queue, its end."""

from __future__ import annotations

import asyncio
import http.client
import json
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_process import server
from starlette.testclient import TestClient

from depthprune_runtime import InputError, cli
from depthprune_runtime.engine.runner import Runner
from depthprune_runtime.server.app import application
from depthprune_runtime.server.options import ServerOptions

OPTIONS = ServerOptions()
LONG = {"prompt": "the quick", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def served(runtime, options=OPTIONS, **engine):
    """The application in this process."""
    return TestClient(application(runtime.engine(kv_memory="4MiB", **engine), options, "pico", "1.2.3"))


@pytest.fixture
def client(pico_runtime):
    with served(pico_runtime) as found:
        yield found


def metrics(client) -> dict[str, float]:
    """Sample -> value; labels that all have are left out."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "pico"
            reason = sample.labels.get("finished_reason", "")
            found[f"{sample.name}{reason and '/'}{reason}{sample.labels.get('le', '')}"] = sample.value
    return found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature: expected a number from 0 to 10000"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature: expected a number"),
        ({}, "prompts: expected"),
        ({"prompt": []}, "expected at least one prompt"),
        ({"prompt": {}}, 'a dictionary of "prompt"'),
        ({"prompt": 5}, "prompts: expected"),
        ({"prompt": [10**9]}, "expected token ids below"),
        ({"prompt": ["a", 5]}, "expected a string or a sequence of token ids"),
        ({"prompt": "a\udcff"}, "expected Unicode text"),
        ({"prompt": "a" * 400}, "shorten it"),
        ({"prompt": "a", "stop_token_ids": [2**63]}, "stop_token_ids: expected token ids below 384"),
        ({"prompt": "a", "n": 100_000}, "n: expected"),
        ({"prompt": "a", "logprobs": 21}, "logprobs: expected at most 20"),
        ({"prompt": "a", "logit_bias": {"384": 1}}, "logit_bias: expected token ids below 384"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: expected an integer >= 1"),
        ({"prompt": "a", "stream": "yes"}, "stream: expected true or false"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options: expected none without stream"),
        ({"prompt": "a", "priority": 2**80}, "priority: expected an integer"),
        ({"prompt": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens: this server does not serve it"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo: expected no logprobs"),
        ({"prompt": "a", "best_of": 4}, "best_of: this server does not serve it"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format: expected"),
        ({"prompt": "a", "allowed_token_ids": [5], "logit_bias": 5}, "logit_bias: expected token ids with numbers"),
        ({"prompt": "a", "allowed_token_ids": [1], "min_tokens": 2, "stop_token_ids": [1]}, "no token is left"),
        ({"prompt": "a", "model": 5}, "model: expected a string"),
    ],
)
def test_bad_completions_are_one_line(client, body, message):
    answer = client.post("/v1/completions", content=json.dumps(body))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (400, 400, "invalid_request_error")
    assert message in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: expected a list of messages"),
        ({"messages": "hello"}, "messages: expected a list of messages"),
        ({"messages": [5]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "x"}, "tools"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs: expected logprobs"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ 1 }}"}, "chat_template: this server"),
        ({"messages": [{"role": "user", "content": "a"}], "tool_choice": {"type": "function"}}, "tool_choice: expec"),
    ],
)
def test_bad_chats_are_one_line(client, body, message):
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", ["[" * 100_000, "[]", "5", "", "{", '{"seed": ' + "9" * 5000 + "}", b"\xff\xfe"])
def test_what_is_no_object_is_refused(client, path, body):
    answer = client.post(path, content=body)
    assert answer.status_code == 400
    assert "body: expected" in answer.json()["error"]["message"]


def test_a_body_has_a_limit(pico_runtime):
    with served(pico_runtime, ServerOptions(max_body="1KiB")) as client:
        for content in (b" " * 1025, (b" " * 300 for _ in range(5))):  # with its length, and in pieces
            answer = client.post("/v1/completions", content=content)
            assert answer.status_code == 413
            assert "at most 1024 bytes" in answer.json()["error"]["message"]


def test_wrong_paths_and_methods_have_the_same_form(client):
    for answer, status in ((client.get("/v1/nothing"), 404), (client.get("/v1/completions"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status


def test_tokens_there_and_back(client, pico_runtime):
    found = client.post("/tokenize", json={"prompt": "the quick"}).json()
    assert found == {"count": len(found["tokens"]), "max_model_len": 256, "tokens": found["tokens"]}
    assert found["tokens"] == pico_runtime.tokenizer.encode("the quick")
    bare = client.post("/tokenize", json={"prompt": "the quick", "add_special_tokens": False}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": bare}).json() == {"prompt": "the quick"}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
    rendered = pico_runtime.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat == pico_runtime.tokenizer.encode(rendered, add_special_tokens=False)
    assert client.post("/detokenize", json={"tokens": [384]}).status_code == 400


def test_metrics_count_what_ran(client):
    for _ in range(2):
        client.post("/v1/completions", json={"prompt": "the quick", "max_tokens": 5, "n": 2, "ignore_eos": True})
    found = metrics(client)
    assert found["vllm:request_success_total/length"] == 4
    assert found["vllm:generation_tokens_total"] == 20
    assert found["vllm:prompt_tokens_total"] == found["vllm:prefix_cache_queries_total"] > 0
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["vllm:time_to_first_token_seconds_count"] == 4
    assert found["vllm:inter_token_latency_seconds_count"] == 16
    assert found["vllm:e2e_request_latency_seconds_count"] == 2
    assert 0 <= found["vllm:kv_cache_usage_perc"] <= 1
    assert found["vllm:num_preemptions_total"] == 0


def test_a_dead_engine_is_told(client, monkeypatch):
    assert client.get("/health").status_code == 200
    assert client.get("/version").json() == {"version": "1.2.3"}

    def fail(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(Runner, "run", fail)
    streamed = client.post("/v1/completions", json={"prompt": "the", "stream": True})
    assert "device lost" in json.loads(streamed.text.splitlines()[0].removeprefix("data: "))["error"]["message"]
    for answer in (client.get("/health"), client.post("/v1/completions", json={"prompt": "the"})):
        assert answer.status_code == 503
        assert "device lost" in answer.json()["error"]["message"]
    assert client.get("/metrics").status_code == 200


def test_pages_of_other_origins_are_let_in_on_request(pico_runtime):
    asked = {"Origin": "https://a.example"}
    with served(pico_runtime) as client:
        assert "access-control-allow-origin" not in client.get("/version", headers=asked).headers
    with served(pico_runtime, ServerOptions(cors_origins=("https://a.example",), api_keys=("k",))) as client:
        assert client.get("/version", headers=asked).headers["access-control-allow-origin"] == "https://a.example"
        asked["Access-Control-Request-Method"] = "POST"
        assert client.options("/v1/completions", headers=asked).status_code == 200


def test_a_full_queue_says_so(pico_runtime):
    app = application(pico_runtime.engine(kv_memory="4MiB", max_num_seqs=1, max_waiting=1), OPTIONS, "p", "1")

    async def ask():
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as c:
            return await asyncio.gather(*(c.post("/v1/completions", json=LONG) for _ in range(8)))

    answers = asyncio.run(ask())
    refused = [a for a in answers if a.status_code == 503]
    assert {a.status_code for a in answers} == {200, 503}
    assert all("max_waiting" in a.json()["error"]["message"] and a.headers["retry-after"] for a in refused)


@pytest.fixture(scope="module")
def process(pico_file):
    """With room for many tokens: the context of the model is widened."""
    with server(str(pico_file), "--drain-seconds", "1", code=wide()) as started:
        yield started


def wide() -> str:
    return (
        "import dataclasses, sys; from depthprune_runtime import cli\n"
        "from depthprune_runtime.engine import runtime as r\n"
        "plain = r.Runtime.__init__\n"
        "def wide(self, checkpoint, *a, **k):\n"
        "    checkpoint.spec = dataclasses.replace(checkpoint.spec, max_position_embeddings=2**20)\n"
        "    plain(self, checkpoint, *a, **k)\n"
        "r.Runtime.__init__ = wide\n"
        "sys.argv += ['--kv-memory', '1GB']\n"
        "sys.exit(cli.main())"
    )


def connection(process) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(process.url.removeprefix("http://"), timeout=300)


def begin(process, **body) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse | None]:
    one = connection(process)
    one.request("POST", "/v1/completions", json.dumps({**LONG, "max_tokens": 400_000, **body}))
    if not body["stream"]:
        return one, None
    answer = one.getresponse()
    assert answer.status == 200
    answer.read(20)  # it runs
    return one, answer


def running(process) -> float:
    text = httpx.get(f"{process.url}/metrics").text
    values = [s.value for f in text_string_to_metric_families(text) if "num_requests" in f.name for s in f.samples]
    return sum(values)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(process, stream):
    one, answer = begin(process, stream=stream)
    deadline = time.monotonic() + 300
    while not running(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running(process) == 1
    if answer is not None:
        answer.close()
    one.close()
    while running(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running(process) == 0


def test_a_signal_waits_for_what_runs_but_not_for_ever(process):
    _, answer = begin(process, stream=True)
    assert answer is not None
    process.process.terminate()
    *_, last, done = answer.read().decode().removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
    assert process.end() == 0
    assert process.said.count("\n") == 1
    assert process.said.startswith("depthprune: serving dense on http://127.0.0.1:")


def test_what_runs_is_finished_before_the_end(pico_file):
    with server(str(pico_file), "--drain-seconds", "300") as started:
        one = connection(started)
        one.request("POST", "/v1/completions", json.dumps({**LONG, "n": 4, "stream": True}))
        answer = one.getresponse()
        answer.read(20)
        started.process.terminate()
        text = answer.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert text.count('"finish_reason": "length"') == 4
        assert started.end() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port: expected an integer from 0 to 65535"),
        (["--max-body", "x"], "max_body: expected bytes"),
        (["--kv-memory", "none"], "kv_memory: expected bytes"),
        (["--max-num-seqs", "0"], "max_num_seqs: expected an integer"),
        (["--host", "256.0.0.1"], "cannot listen there"),
        (["--uds", "/nowhere/at/all"], "cannot listen there"),
        (["--api-key", "é"], "api_keys: expected printable ASCII"),
        (["--drain-seconds", "-1"], "drain_seconds: expected"),
    ],
)
def test_bad_options_are_told_before_the_model_is_loaded(options, message, capsys):
    assert cli.main(["serve", "nowhere.safetensors", *options]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err


def test_names_and_keys_are_text():
    for name in ("model_names", "api_keys", "cors_origins"):
        for value in ("text", [""], [5]):
            with pytest.raises(InputError, match=name):
                ServerOptions(**{name: value})
    assert "secret" not in repr(ServerOptions(api_keys=("secret",)))
