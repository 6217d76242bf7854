"""Texts as packed windows, and which of them a step sees."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json

import pytest

from depthprune_runtime import InputError
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.healing.data import Source, packed_windows, parse_source
from depthprune_runtime.healing.options import HealOptions
from depthprune_runtime.healing.schedule import (
    Share,
    epoch_windows,
    held_out,
    learning_rate,
    total_steps,
    window_order,
)
from depthprune_runtime.text.tokenizer import Tokenizer

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(pico_file):
    return Tokenizer(open_checkpoint(pico_file))


def plain(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_text_file_is_one_document(tokenizer, tmp_path):
    text = " ".join(f"the quick brown fox {n}" for n in range(40))
    (tmp_path / "a.txt").write_text(text)
    found = packed_windows([Source(str(tmp_path / "a.txt"))], tokenizer, 16, 384)
    expected = [*plain(tokenizer, text), EOS]
    assert found.ids.flatten().tolist() == expected[: len(expected) // 16 * 16]
    assert found.counts == (len(expected) // 16,)
    assert found.description[0]["text"] == "a.txt" and found.description[0]["windows"] == found.counts[0]


@pytest.mark.parametrize("packing", [lambda text: text.encode(), lambda text: gzip.compress(text.encode())])
def test_lines_of_json_are_documents(tokenizer, tmp_path, packing):
    chat = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the dog"}]
    lines = [{"text": "the quick brown fox\n\njumps"}, {"messages": chat, "id": 3}]
    name = "d.jsonl" if packing("a")[:1] == b"a" else "d.jsonl.gz"
    (tmp_path / name).write_bytes(packing("\n".join(map(json.dumps, lines)) + "\n\n"))
    found = packed_windows([Source(str(tmp_path / name))], tokenizer, 4, 384)
    rendered = "<|user|>user: the fox\n<|user|>assistant: the dog\n"
    expected = [*plain(tokenizer, lines[0]["text"]), EOS, *plain(tokenizer, rendered), EOS]
    assert found.ids.flatten().tolist() == expected[: len(expected) // 4 * 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wikitext2", Source("wikitext2", 1.0)),
        ("a.txt:2", Source("a.txt", 2.0)),
        ("a:b.txt:0.5", Source("a:b.txt", 0.5)),
        ("a:b.txt", Source("a:b.txt", 1.0)),
    ],
)
def test_a_weight_stands_behind_a_colon(text, expected):
    assert parse_source(text) == expected


@pytest.mark.parametrize("text", ["a.txt:0", "a.txt:-1", "a.txt:nan", ":2", ""])
def test_weights_that_are_none(text):
    with pytest.raises(InputError, match="data: expected a text and a weight above 0"):
        parse_source(text)


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"text": 3}', '{"messages": "hello"}'])
def test_lines_that_are_no_documents(tokenizer, tmp_path, line):
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises(InputError, match=r"data d.jsonl: line 1: expected") as caught:
        packed_windows([Source(str(tmp_path / "d.jsonl"))], tokenizer, 4, 384)
    assert "\n" not in str(caught.value)


def test_an_epoch_goes_through_each_text_as_often_as_its_weight():
    shares = [Share(tuple(range(10)), 1.0), Share(tuple(range(10, 30)), 2.5)]
    order = epoch_windows(shares, seed=3, epoch=0)
    counts = [order.count(n) for n in range(30)]
    assert counts[:10] == [1] * 10
    assert sorted(counts[10:]) == [2] * 10 + [3] * 10
    assert order != sorted(order)
    assert epoch_windows(shares, 3, 0) == order
    assert epoch_windows(shares, 3, 1) != order and epoch_windows(shares, 4, 0) != order
    both = list(itertools.islice(window_order(shares, 3), 2 * len(order)))
    assert both == order + epoch_windows(shares, 3, 1)


def test_steps_of_a_run():
    shares = [Share(tuple(range(100)), 1.0)]
    assert total_steps(shares, HealOptions(batch=8, epochs=2.0)) == 25
    assert total_steps(shares, HealOptions(batch=8, seq_len=64, tokens=3 * 8 * 64 + 1)) == 3
    with pytest.raises(InputError, match="no text is left to train on"):
        total_steps([Share((), 1.0)], HealOptions())


def test_windows_held_out_are_the_same_in_every_run():
    options = HealOptions(held_out=5)
    found = held_out(50, options).tolist()
    assert len(set(found)) == 5 and found == held_out(50, options).tolist()
    assert found != held_out(50, dataclasses.replace(options, seed=1)).tolist()
    with pytest.raises(InputError, match="5 windows of 512 tokens, of which 5 are held out"):
        held_out(5, options)


def test_the_learning_rate_rises_and_falls():
    options = HealOptions(learning_rate=2.0, warmup=0.1)
    rates = [learning_rate(step, 100, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[99] < 0.001
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 10, HealOptions(learning_rate=2.0, warmup=0.0)) == 2.0
