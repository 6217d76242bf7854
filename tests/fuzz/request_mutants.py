"""Requests with odd sampling parameters, prompts and messages."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from fuzz.json_mutants import ODD_TEXTS
from fuzz.mutation import Mutant, Mutation
from fuzz.originals import IDS, MESSAGES, TEXT
from fuzz.uses import MAX_TOKENS, REQUEST_KINDS

_NAN, _INF = float("nan"), float("inf")
_JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.5, "", "x", "1", b"bytes", [], {}, [0], {"a": 1}, [None], (), {1, 2}, object(), 1j,
    _NAN, _INF, -_INF, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400), 1e300, 1e-300, "\ud800", [[1]], range(3),
    "9" * 5000,
)  # fmt: skip
_ALL = range(384)
_FIELDS: dict[str, tuple[Any, ...]] = {
    "n": (1, 2, 3, 64, 65, 16_385, 100_000, 2**31),
    "temperature": (0.0, 1e-45, 1e-38, 1e-10, 1e-5, 0.5, 1.0, 2.0, 100.0, 1e10, 1e38, 1e300),
    "top_p": (1e-45, 1e-10, 0.5, 0.999999999, 1.0, 1.0000001, 2),
    "top_k": (-1, 0, 1, 2, 383, 384, 385, 10**6, 2**31, 2**63),
    "min_p": (0.0, 1e-45, 0.5, 1.0, 1.5),
    "repetition_penalty": (1e-45, 1e-40, 1e-38, 0.5, 1.0, 1.5, 1e30, 1e38, 1e300),
    "seed": (0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -1),
    "stop": ("a", " ", "\ud800", "\x00", ["a", "b"], ["a"] * 10_000, ["x" * 100_000], [""], "</s>", "é", "\ufffd"),
    "stop_token_ids": ([0], [1, 383], [384], [-1], [2**31], [2**63], [2**64], [1.5], [True], ["1"], [*range(384)] * 9),
    "ignore_eos": (True, False),
    "max_tokens": (None, 1, 2, 100, 255, 256, 257, 2**31, 2**63, 10**400),
    "logprobs": (-1, 0, 1, 5, 20, 383, 384, 385, 10**6, 2**63),
    "min_tokens": (0, 1, 5, 6, 7, 100, 2**31),
    "presence_penalty": (-2, -1e-45, 0, 0.5, 2.0, 2.1, 1e300),
    "frequency_penalty": (-2, -1e-45, 0, 0.5, 2.0, 2.1, 1e300),
    "logit_bias": ({5: 100}, {"5": -100}, {383: 1e-45}, {384: 1}, {-1: 1}, {5: 101}, {"x": 1}, dict.fromkeys(_ALL, 1)),
    "allowed_token_ids": ([5], [1], [*range(384)] * 3, [384], [-1], [2**63], []),
    "bad_words": ("a", "the", [" "], ["</s>", "<s>"], ["a"] * 257, ["x" * 5000], ["\ud800"], ["the quick", "é"]),
    "detokenize": (True, False),
    "spaces_between_special_tokens": (True, False),
    "skip_special_tokens": (True, False),
    "include_stop_str_in_output": (True, False),
    "add_special_tokens": (True, False),
    "split_special_tokens": (True, False),
}  # fmt: skip


def _text(rng: random.Random) -> str:
    kind = rng.choice(("odd", "unicode", "special", "long", "plain", "bytes"))
    if kind == "odd":
        return rng.choice(ODD_TEXTS)
    if kind == "unicode":
        return "".join(
            chr(rng.choice((rng.randrange(0x110000), rng.randrange(0x3000), 0x200D, 0xFE0F))) for _ in range(30)
        )
    if kind == "special":
        return rng.choice(("<s>", "</s>", "<|user|>", "<|assistant|>", "<unk>")) * rng.choice((1, 3, 300))
    if kind == "long":
        return rng.choice(("a", "the ", "é", "\n", " ", "\x00")) * rng.choice((300, 10_000, 480_000))
    if kind == "plain":
        return TEXT[: rng.randrange(len(TEXT))]
    return rng.randbytes(20).decode("utf-8", rng.choice(("replace", "surrogateescape", "ignore")))


def _prompt(rng: random.Random) -> Any:
    kind = rng.choice(("text", "text", "ids", "ids", "junk", "list", "mapping", "kind of sequence"))
    if kind == "text":
        return _text(rng)
    if kind == "ids":
        ids: list[Any] = [
            rng.randrange(384) for _ in range(rng.choice((0, 1, 5, 100, 249, 250, 254, 255, 256, 257, 5000)))
        ]
        if ids and rng.random() < 0.5:
            ids[rng.randrange(len(ids))] = rng.choice((*_JUNK, -1, 383, 384, 2**31 - 1))
        return ids
    if kind == "junk":
        return rng.choice(_JUNK)
    if kind == "list":
        return [rng.choice((TEXT, list(IDS), _text(rng), rng.choice(_JUNK))) for _ in range(rng.randrange(5))]
    if kind == "mapping":
        key = rng.choice(("prompt_token_ids", "prompt", "multi_modal_data", "x", 1, None))
        made = {key: rng.choice((TEXT, list(IDS), _text(rng), rng.choice(_JUNK)))}
        return made if rng.random() < 0.7 else [made, {"prompt": TEXT}]
    import numpy
    import torch

    return rng.choice(
        (
            numpy.array(IDS), numpy.array(IDS, dtype=numpy.float32), torch.tensor(IDS), tuple(IDS), iter(IDS), set(IDS),
            torch.tensor([IDS]), torch.tensor(3), numpy.int64(3), [numpy.int64(i) for i in IDS], bytearray(b"abc"),
            [torch.tensor(i) for i in IDS], memoryview(b"abc"), range(2, 9), numpy.array([[1], [2]]),
            torch.tensor([1.0, 2.0]),
        )
    )  # fmt: skip


def _content(rng: random.Random) -> Any:
    parts = [
        {"type": "text", "text": _text(rng)},
        {"type": "image_url", "image_url": "x"},
        {"type": "text"},
        {},
        "x",
        1,
    ]
    return rng.choice(
        (_text(rng), None, [], [rng.choice(parts)], rng.sample(parts, 2), {"a": 1}, 5, b"x", "", _text(rng))
    )


def _messages(rng: random.Random) -> Any:
    if rng.random() < 0.15:
        return rng.choice((*_JUNK, "hello", {"role": "user", "content": "x"}, [[]], ["x"], iter(MESSAGES)))
    made = []
    for _ in range(rng.choice((1, 1, 2, 3, 300))):
        role = rng.choice(("user", "assistant", "system", "tool", "nobody", "", None, 5, [], "\x1b[2J"))
        message: dict[Any, Any] = {"role": role, "content": _content(rng)}
        if rng.random() < 0.3:
            call = {"type": "function", "function": {"name": "f", "arguments": rng.choice(("{}", {}, "{", None))}}
            message["tool_calls"] = rng.choice(([call], [], None, "x", [{}]))
        if rng.random() < 0.2:
            message.pop(rng.choice(list(message)))
        if rng.random() < 0.1:
            message[rng.choice(("x", "name", 5, None))] = rng.choice(_JUNK)
        made.append(message)
    return made


def _chat_option(rng: random.Random) -> dict[str, Any]:
    """What a chat template is given besides the messages."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    values: dict[str, tuple[Any, ...]] = {
        "tools": ([tool], [], [{}], "x", [len]),
        "documents": ([{"title": "a", "text": "b"}], [], 5),
        "chat_template": ("{{ messages }}", "{{", "", "tool_use", "{{ 9 ** 9 ** 9 }}", "{{ range(9 ** 9) }}"),
        "add_generation_prompt": (True, False),
        "continue_final_message": (True, False),
        "chat_template_kwargs": ({"enable_thinking": False}, {"messages": 1}, {1: 2}, [], {"x": object()}),
    }
    name = rng.choice(list(values))
    return {name: rng.choice(_JUNK) if rng.random() < 0.3 else rng.choice(values[name])}


def request_mutant(format: str, seed: int, original: str, files: Mapping[str, bytes]) -> Mutant:
    """One request; the seed decides everything about it."""
    rng = random.Random(f"{format} {seed} mutant")
    kind = rng.choices(REQUEST_KINDS, (3, 2, 2, 1, 4))[0]
    params: dict[str, Any] = {
        "temperature": rng.choice((0.0, 1.0)),
        "max_tokens": MAX_TOKENS,
        "seed": rng.randrange(99),
    }
    if rng.random() < 0.3:
        params |= {"max_tokens": 100, "temperature": 1.0, "ignore_eos": True}  # any token may come
    payload: dict[str, Any] = {"kind": kind, "prompt": TEXT, "messages": MESSAGES, "options": {}, "request": {}}
    mutations = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        name = rng.choice(list(_FIELDS))
        params[name] = rng.choice(_JUNK) if rng.random() < 0.3 else rng.choice(_FIELDS[name])
        mutations.append(Mutation("parameter", name, (name,)))
    if kind == "chat" and (rng.random() < 0.7 or not mutations):
        payload["messages"] = _messages(rng)
        mutations.append(Mutation("messages", "messages"))
        if rng.random() < 0.4:
            payload["options"] = _chat_option(rng)
            mutations.append(Mutation("chat option", next(iter(payload["options"]))))
    elif rng.random() < 0.5 or not mutations:
        payload["prompt"] = _prompt(rng)
        mutations.append(Mutation("prompt", "prompt"))
    if kind == "engine" and rng.random() < 0.3:
        payload["request"] = {rng.choice(("request_id", "priority")): rng.choice((*_JUNK, "plain", "request-0"))}
        mutations.append(Mutation("request", next(iter(payload["request"]))))
    elif rng.random() < 0.15 and not payload["options"]:
        option = rng.choice(("max_new_tokens", "max_tokens", "temprature", "n", "top_k", "best_of"))
        payload["options"] = {option: rng.choice((*_JUNK, 3))}
        mutations.append(Mutation("option", option.replace("max_new_tokens", "max_tokens")))
    payload["params"] = params
    return Mutant(format, seed, original, tuple(mutations), {}, payload=payload)
