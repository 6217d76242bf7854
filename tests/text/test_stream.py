"""Streamed text against the whole sequence decoded at once, for tokenizers of every kind."""

from __future__ import annotations

import functools
import re
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, build
from tokenizers import Tokenizer, decoders, models

from depthprune_runtime.text.detokenizer import Detokenizer
from depthprune_runtime.text.stream import TextStream

PROMPTS = ["", "hello world", "a", "東京 naïve", "  a  b ", "hello<|end|>", "<|end|><|end|> ", "🙂"]


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    return build(kind)


@functools.cache
def detokenizer(kind: str) -> Detokenizer:
    """One for all examples of a kind, so that streams learn from one another."""
    return Detokenizer(tokenizer(kind))


def expected(kind: str, ids: list[int], skip: bool) -> str:
    """What the library decodes, byte tokens apart: their runs are UTF-8, whatever is around them."""
    raw = tokenizer(kind)
    if "<0x00>" not in raw.get_vocab():
        return raw.decode(ids, skip_special_tokens=skip)
    special = {i for i, token in raw.get_added_tokens_decoder().items() if token.special}
    tokens = [t for i in ids if not (skip and i in special) and (t := raw.id_to_token(i)) is not None]
    text = ""
    for is_byte, run in groupby(tokens, lambda t: re.fullmatch("<0x..>", t) is not None):
        if is_byte:
            text += bytes(int(t[3:5], 16) for t in run).decode(errors="replace")
        else:
            text += "".join(run).replace("▁", " ")
    return text.removeprefix(" ") if tokens and (kind == "byte_fallback" or tokens[0].startswith("▁")) else text


def streamed(kind: str, prompt_ids: list[int], ids: list[int], skip: bool = True) -> list[str]:
    stream = TextStream(detokenizer(kind), skip, prompt_ids).fork()
    return [*(stream.push(i) for i in ids), stream.flush()]


def ids_of(kind: str):
    """Ids with a few that have no token, and long runs of one."""
    size = tokenizer(kind).get_vocab_size()
    one = st.integers(0, size + 2) | st.sampled_from([2**31 - 1, 2**32, 2**64])
    runs = st.tuples(one, st.integers(30, 80)).map(lambda pair: [pair[0]] * pair[1])
    return st.lists(one.map(lambda i: [i]) | runs, max_size=12).map(lambda parts: [i for part in parts for i in part])


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_prompt_and_streamed_text_are_the_text_of_all_ids(kind, skip, data):
    prompt = tokenizer(kind).encode(data.draw(st.sampled_from(PROMPTS))).ids
    ids = data.draw(ids_of(kind))
    parts = streamed(kind, prompt, ids, skip)
    known = [i for i in ids if i < 2**32]
    assert expected(kind, prompt, skip) + "".join(parts) == expected(kind, prompt + known, skip)
    assert detokenizer(kind).decode(prompt + ids, skip) == expected(kind, prompt + known, skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram"])
def test_incomplete_characters_are_held_back_and_complete_ones_are_not(kind):
    raw = tokenizer(kind)
    ids = raw.encode("🙂 né", add_special_tokens=False).ids
    stream = TextStream(detokenizer(kind))
    parts = [stream.push(i) for i in ids]
    assert "".join(parts).strip() == "🙂 né"
    assert not any("�" in part for part in parts)
    last_of_smile = next(n for n in range(1, len(ids) + 1) if "🙂" in detokenizer(kind).decode(ids[:n]))
    assert parts[last_of_smile - 1].endswith("🙂")


@pytest.mark.parametrize("kind", ["byte_fallback", "unigram"])
def test_bytes_that_are_no_text_spoil_no_complete_character(kind):
    raw = tokenizer(kind)
    e_acute, broken = [raw.token_to_id(t) for t in ("<0xC3>", "<0xA9>")], raw.token_to_id("<0xF0>")
    a = raw.token_to_id("a")
    assert streamed(kind, [], [*e_acute, broken, a]) == ["", "é", "", "�a", ""]
    assert streamed(kind, [], [*e_acute, broken]) == ["", "é", "", "�"]
    assert detokenizer(kind).decode([*e_acute, broken, a]) == "é�a"
    assert streamed(kind, [], [raw.token_to_id("<0x0A>"), broken, a]) == ["\n", "", "�a", ""]


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace", "unigram", "word_piece", "no_decoder"])
def test_the_first_word_keeps_its_space_behind_a_prompt(kind):
    raw = tokenizer(kind)
    world = next(i for t in ("▁world", "world") if (i := raw.token_to_id(t)) is not None)
    prompt = raw.encode("hello").ids
    assert "".join(streamed(kind, prompt, [world])) == " world"
    assert "".join(streamed(kind, [*prompt, raw.token_to_id("</s>")], [world])) == " world"  # skipped: no text
    assert "".join(streamed(kind, [], [world])) == "world"


def test_a_character_begun_in_the_prompt_belongs_to_the_output():
    ids = tokenizer("byte_level").encode("🙂", add_special_tokens=False).ids
    whole = [i for c in "🙂".encode() for i in [tokenizer("byte_level").token_to_id(BYTE_LEVEL[c])]]
    assert detokenizer("byte_level").decode(whole) == detokenizer("byte_level").decode(ids) == "🙂"
    assert "".join(streamed("byte_level", whole[:2], [*whole[2:], *ids])) == "🙂🙂"
    assert (
        "".join(streamed("byte_level", whole[:2], tokenizer("byte_level").encode("a", add_special_tokens=False).ids))
        == "a"
    )


BYTE_LEVEL = {0xF0: "ð", 0x9F: "Ł", 0x99: "Ļ", 0x82: "Ĥ"}


def test_a_stream_decodes_a_bounded_window(monkeypatch):
    """A token's cost does not depend on how many there were, whatever they are."""
    for kind in KINDS:
        longest = 0
        own = Detokenizer(tokenizer(kind))
        decode = own.decode

        def watched(ids, skip=True, decode=decode):
            nonlocal longest
            longest = max(longest, len(ids))
            return decode(ids, skip)

        monkeypatch.setattr(own, "decode", watched)
        for token in {0, 1, 4, 130, 200} & set(range(tokenizer(kind).get_vocab_size())):
            stream = TextStream(own)
            for _ in range(300):
                stream.push(token)
        assert 0 < longest <= 64, kind


def test_a_decoder_that_panics_ends_nothing(caplog):
    raw = Tokenizer(models.WordLevel(vocab={" ": 0, "a": 1}, unk_token="a"))
    raw.decoder = decoders.Strip(" ", 1, 1)  # the library's slice ends before it starts
    with pytest.raises(BaseException, match="slice") as caught:
        raw.decode([0])
    assert not isinstance(caught.value, Exception)
    broken = Detokenizer(raw)
    stream = TextStream(broken)
    assert [stream.push(i) for i in (1, 0, 1)] == ["a", " ", "a"]
    assert "decoder failed" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_different_tokens_have_different_texts(kind):
    raw = tokenizer(kind)
    texts = {i: detokenizer(kind).token_text(i) for i in raw.get_vocab().values()}
    assert None not in texts.values()
    assert len(set(texts.values())) == len(texts)
    assert detokenizer(kind).token_text(raw.token_to_id("<|end|>")) == "<|end|>"
    assert (
        detokenizer(kind).token_text(10**6)
        is detokenizer(kind).token_text(-1)
        is detokenizer(kind).token_text(2**40)
        is None
    )


def test_a_tokens_text_has_its_space_and_names_its_bytes():
    assert detokenizer("byte_fallback").token_text(tokenizer("byte_fallback").token_to_id("▁world")) == " world"
    assert detokenizer("byte_fallback").token_text(tokenizer("byte_fallback").token_to_id("<0xE2>")) == "<0xE2>"
    assert detokenizer("byte_level").token_text(tokenizer("byte_level").token_to_id("ð")) == "<0xF0>"
    assert detokenizer("word_piece").token_text(tokenizer("word_piece").token_to_id("##s")) == "s"
    assert detokenizer("word_piece").token_text(tokenizer("word_piece").token_to_id("hello")) == " hello"
