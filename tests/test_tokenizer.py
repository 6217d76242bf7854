"""Our thin tokenizer against Transformers'."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

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
