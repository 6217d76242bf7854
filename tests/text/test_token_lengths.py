"""How many tokens a text has at least: never more than it has, and known before it is tokenised."""

from __future__ import annotations

import threading
import time

import pico
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from depthprune_runtime import InputError
from depthprune_runtime.text.token_lengths import token_lengths


def byte_level() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(pico.build_tokenizer().backend_tokenizer.to_str())


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 has it: spaces become U+2581, unknown characters their bytes."""
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "aa": 259, "▁aaa": 260}
    merges = [("▁", "a"), ("a", "a"), ("▁a", "aa")]
    found = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return found


def composing() -> tokenizers.Tokenizer:
    found = byte_level()
    found.normalizer = normalizers.NFC()
    return found


def without_bytes() -> tokenizers.Tokenizer:
    """Characters without a token vanish."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    control = {chr(0x100 + b) for b in (4, 6, 0x13)}
    found = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(set(alphabet) - control))}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return found


KINDS = {f.__name__: f() for f in (byte_level, byte_fallback, composing, without_bytes)}
PIECES = [
    "the quick brown",
    " ",
    "a" * 9,
    "\u03b1\u0313\u0300\u0345",
    "e\u0301",
    "\x04\x06\x13",
    "\x00",
    "東京🙂",
    "\n\n",
    "<|user|>",
]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=20), times=st.integers(1, 30))
def test_a_text_never_has_fewer_tokens(name, pieces, times):
    text = "".join(pieces) * times
    assert token_lengths(KINDS[name]).least(text) <= len(KINDS[name].encode(text, add_special_tokens=False).ids)


def test_what_has_no_token_does_not_count():
    kept = KINDS["without_bytes"]
    assert kept.encode("\x04" * 1000).ids == []
    assert token_lengths(kept).least("\x04" * 1000 + "abc") == 3
    assert token_lengths(KINDS["byte_fallback"]).least("\x04" * 1200) == 200  # the longest token is "<0x..>"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.Strip()),
        lambda t: setattr(t, "normalizer", normalizers.Replace(Regex(" +"), " ")),
        lambda t: setattr(t, "normalizer", normalizers.Replace("  ", " ")),
        lambda t: setattr(t, "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])),
        lambda t: setattr(t, "normalizer", normalizers.BertNormalizer()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
        lambda t: setattr(t, "model", models.Unigram([("a", -1.0), ("b", -1.0)], unk_id=0)),
        lambda t: t.add_special_tokens([AddedToken("<mask>", lstrip=True)]),
    ],
)
def test_what_may_drop_characters_has_no_limit(change):
    found = byte_level()
    assert token_lengths(found).longest == max(map(len, found.get_vocab()))
    change(found)
    assert token_lengths(found) is None


def test_what_cannot_fit_is_refused_before_it_is_tokenised(pico_runtime, monkeypatch):
    engine = pico_runtime.engine(kv_memory="1MiB")
    longest = pico_runtime.tokenizer.token_lengths.longest
    encoded = []
    plain = type(pico_runtime.tokenizer).encode
    monkeypatch.setattr(type(pico_runtime.tokenizer), "encode", lambda *a: encoded.append(1) or plain(*a))
    text = "the quick brown fox " * 24_000
    with pytest.raises(InputError, match=f"at most 255 tokens .* got at least {-(-len(text) // longest)}; shorten it"):
        engine.prepare(text)
    assert not encoded
    with pytest.raises(InputError, match=r"at most 255 tokens .* got \d+; shorten it"):
        engine.prepare("the quick brown fox " * 60)
    assert encoded


def test_a_long_text_is_tokenised_as_a_short_one_is(pico_runtime):
    tokenizer = pico_runtime.tokenizer
    text = "the quick brown fox 🙂 <|user|> " * 400
    theirs = pico.build_tokenizer()
    for special in (True, False):
        assert tokenizer.encode(text, special) == theirs(text, add_special_tokens=special)["input_ids"]


def test_other_threads_run_while_a_long_text_is_tokenised(pico_runtime):
    """Work is counted, not time: with the GIL held, the other thread would not come to count at all."""
    text = "the quick brown fox " * 40_000
    counted, done = [], threading.Event()

    def count():
        while not done.is_set():
            counted.append(1)
            time.sleep(0.0001)

    other = threading.Thread(target=count)
    other.start()
    before = len(counted)
    pico_runtime.tokenizer.encode(text)
    during = len(counted) - before
    done.set()
    other.join()
    assert during > 20
