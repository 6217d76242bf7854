"""A server process, and OpenAI's own client: whole and streamed, sync and async."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from server_process import server

KEY = "secret-1"
GREEDY = {"temperature": 0, "seed": 1}
MESSAGES = [{"role": "user", "content": "the quick"}]


@pytest.fixture(scope="module")
def url(pico_file):
    with server(str(pico_file), "--served-model-name", "pico", "--api-key", KEY, DEPTHPRUNE_API_KEY="other") as started:
        yield started.url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def plain(pico_runtime, prompt="the quick", **options):
    return pico_runtime.generate(prompt, temperature=0, **options)[0]


def test_models(client):
    (found,) = client.models.list().data
    assert found.id == "pico"
    assert client.models.retrieve("pico").max_model_len == 256


def test_a_completion_is_what_generate_gives(client, pico_runtime):
    expected = plain(pico_runtime, max_tokens=12, ignore_eos=True)
    found = client.completions.create(
        model="pico", prompt="the quick", max_tokens=12, extra_body={"ignore_eos": True}, **GREEDY
    )
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert found.usage.completion_tokens == 12
    assert found.usage.total_tokens == 12 + len(expected.prompt_token_ids)


@pytest.mark.parametrize("prompts", [["the quick", "a decoder"], [[5, 6, 7], [8, 9]], [5, 6, 7]])
def test_prompts_of_every_kind_and_n(client, pico_runtime, prompts):
    found = client.completions.create(model="pico", prompt=prompts, max_tokens=5, n=2, **GREEDY)
    expected = [o.text for r in pico_runtime.generate(prompts, temperature=0, max_tokens=5, n=2) for o in r.outputs]
    assert [c.text for c in found.choices] == expected
    assert [c.index for c in found.choices] == list(range(len(expected)))


def test_a_streamed_completion_adds_up(client, pico_runtime):
    expected = plain(pico_runtime, max_tokens=12)
    chunks = list(
        client.completions.create(
            model="pico", prompt=["the quick", "a decoder"], max_tokens=12, n=2, echo=True, stream=True,
            stream_options={"include_usage": True}, **GREEDY,
        )
    )  # fmt: skip
    texts = ["", "", "", ""]
    for chunk in chunks[:-1]:
        assert len(chunk.choices) == 1
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts[0] == texts[1] == "the quick" + expected.text
    assert texts[2].startswith("a decoder")
    assert chunks[-1].choices == []
    whole = client.completions.create(model="pico", prompt=["the quick", "a decoder"], max_tokens=12, n=2, **GREEDY)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)


def test_logprobs_of_completions(client, pico_runtime):
    expected = plain(pico_runtime, max_tokens=4, logprobs=2).outputs[0]
    options = {"model": "pico", "prompt": "the quick", "max_tokens": 4, "logprobs": 2, **GREEDY}
    found = client.completions.create(**options).choices[0].logprobs
    assert found.token_logprobs == pytest.approx(
        [row[t].logprob for t, row in zip(expected.token_ids, expected.logprobs, strict=True)], abs=1e-4
    )
    assert [len(row) for row in found.top_logprobs] == [2] * 4
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(4)]
    streamed = [c.choices[0].logprobs for c in client.completions.create(stream=True, **options)]
    for name in ("tokens", "text_offset"):
        assert [x for one in streamed for x in getattr(one, name)] == getattr(found, name)


def test_chat_is_what_chat_gives(client, pico_runtime):
    expected = pico_runtime.chat(MESSAGES, temperature=0, max_new_tokens=9)
    found = client.chat.completions.create(model="pico", messages=MESSAGES, max_completion_tokens=9, **GREEDY)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    parts = [{"role": "user", "content": [{"type": "text", "text": "the quick"}]}]
    again = client.chat.completions.create(model="pico", messages=parts, max_tokens=9, **GREEDY)
    assert again.choices[0].message.content == expected.text


def test_chat_logprobs_and_n(client):
    found = client.chat.completions.create(
        model="pico", messages=MESSAGES, max_tokens=3, n=2, logprobs=True, top_logprobs=3, temperature=1, seed=5
    )
    assert len(found.choices) == 2
    for choice in found.choices:
        assert len(choice.logprobs.content) == 3
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 3
            assert bytes(entry.bytes).decode() == entry.token
            assert entry.top_logprobs[0].logprob >= entry.logprob


def test_a_stream_of_the_client_helper(client):
    options = {"model": "pico", "messages": MESSAGES, "max_tokens": 9, **GREEDY}
    stop = client.chat.completions.create(**options).choices[0].message.content[4]
    options["stop"] = stop  # the helper raises where the limit of tokens ends an answer
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(stream_options={"include_usage": True}, **options) as stream:
        for _ in stream:
            pass
        found = stream.get_final_completion()
    assert found.choices[0].message.content == whole.choices[0].message.content
    assert found.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert found.usage == whole.usage


def test_many_at_once(url, client):
    expected = client.completions.create(model="pico", prompt="the quick", max_tokens=8, **GREEDY).choices[0].text

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0) as many:
            one = {"model": "pico", "prompt": "the quick", "max_tokens": 8, **GREEDY}
            whole = [many.completions.create(**one) for _ in range(6)]
            found = [r.choices[0].text for r in await asyncio.gather(*whole)]
            text = ""
            async for chunk in await many.completions.create(stream=True, **one):
                text += chunk.choices[0].text
            return [*found, text]

    assert asyncio.run(ask()) == [expected] * 7


def test_stop_and_what_vllm_adds(client):
    options = {"model": "pico", "prompt": "the quick", "max_tokens": 8, **GREEDY}
    text = client.completions.create(**options).choices[0].text
    stopped = client.completions.create(stop=[text[2]], **options).choices[0]
    assert (stopped.finish_reason, stopped.text) == ("stop", text[: text.index(text[2])])
    assert stopped.stop_reason == text[2]
    found = client.completions.create(
        logit_bias={"7": 100}, presence_penalty=-2, frequency_penalty=-2, extra_body={"min_tokens": 8}, **options
    )
    assert found.usage.completion_tokens == 8


def test_a_key_is_needed(url):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.post(f"{url}/tokenize", json={"prompt": "a"}).status_code == 401
    assert [httpx.get(f"{url}{path}").status_code for path in ("/health", "/ping", "/version", "/metrics")] == [200] * 4


def test_another_model_is_not_there(client):
    with pytest.raises(openai.NotFoundError, match="expected pico, got 'gpt-4o'"):
        client.completions.create(model="gpt-4o", prompt="a")


def test_bad_values_are_the_clients_error(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="pico", prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(model="pico", messages=MESSAGES, tool_choice="required")
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    found = client.chat.completions.create(
        model="pico", messages=MESSAGES, tools=[tool], tool_choice="auto", max_tokens=2
    )
    assert found.usage.completion_tokens == 2
