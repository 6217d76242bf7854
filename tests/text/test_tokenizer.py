"""Our thin tokenizer against Transformers'."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pico
import pytest
from transformers import AutoTokenizer

from depthprune_runtime import InputError
from depthprune_runtime.text.tokenizer import Tokenizer

UNPRINTABLE = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a\nb"]]}}).encode()
TEXTS = ["the quick", "", " leading", "naïve 東京 🙂", "<s> special </s> text", "line\nbreak\t tab"]


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_equal_transformers(pico_runtime, pico_llama, text):
    theirs = AutoTokenizer.from_pretrained(pico_llama[1])
    ours = pico_runtime.tokenizer
    assert ours.encode(text) == theirs(text)["input_ids"]
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_stream_holds_back_incomplete_characters(pico_runtime):
    tokenizer = pico_runtime.tokenizer
    text = "🙂 東京 é"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.flush() == text
    assert not any("�" in p for p in parts)
    cut = tokenizer.stream()  # the rocket is not in the training corpus: four tokens
    shown = [cut.push(i) for i in tokenizer.encode("🚀", add_special_tokens=False)[:2]]
    assert shown == ["", ""]
    assert cut.flush() == tokenizer.decode(tokenizer.encode("🚀", add_special_tokens=False)[:2])


def test_the_tokenizers_beginning_can_be_left_out(pico_runtime):
    tokenizer = pico_runtime.tokenizer
    bos = tokenizer.special_token_id("bos_token")
    for add in (True, False):
        out = pico_runtime.generate("<s>the", max_new_tokens=1, add_special_tokens=add)[0]
        assert out.prompt_token_ids.count(bos) == 1 + add
    out = pico_runtime.generate("<s>the", max_new_tokens=1, add_special_tokens=False, split_special_tokens=True)[0]
    assert bos not in out.prompt_token_ids
    with pytest.raises(InputError, match="cannot be encoded: expected Unicode text, got lone surrogates"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("stated", "file", "names"),
    [
        (
            [
                {"name": "default", "template": "d"},
                {"name": "rag", "template": "r"},
                {"name": 3},
                {"name": ["a"], "template": "t"},
                "x",
            ],
            None,
            "dr",
        ),
        ([{"name": "rag", "template": "r"}], b"f", "fr"),
        ("d", None, "d"),
        (3, None, ""),
    ],
)
def test_templates_of_the_tokenizers_config(stated, file, names):
    assets = {
        "tokenizer.json": pico.build_tokenizer().backend_tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"chat_template": stated}).encode(),
        **({} if file is None else {"chat_template.jinja": file}),
    }
    tokenizer = Tokenizer(SimpleNamespace(name="m", assets=assets))
    messages = [{"role": "user", "content": "Hi"}]
    found = []
    for name in ("default", "rag"):
        try:
            found.append(tokenizer.apply_chat_template(messages, chat_template=name if name == "rag" else None))
        except InputError:
            continue
    assert "".join(f for f in found if f != "rag") == names
    assert tokenizer.chat_template == (names[0] if names else None)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer_config.json", b"{", "its tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "its tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"\xff", "its tokenizer_config.json is not UTF-8"),
        ("chat_template.jinja", b"\xff", "its chat_template.jinja is not UTF-8"),
        ("tokenizer.json", b"\xff", "its tokenizer.json cannot be read"),
        ("tokenizer.json", UNPRINTABLE, "its tokenizer.json cannot be read: .*a.nb"),
    ],
)
def test_damaged_files_of_a_tokenizer_are_named(name, data, message):
    good = {"tokenizer.json": pico.build_tokenizer().backend_tokenizer.to_str().encode()}
    with pytest.raises(InputError, match=f"^m: {message}") as caught:
        Tokenizer(SimpleNamespace(name="m", assets={**good, name: data}))
    assert str(caught.value).isprintable()
