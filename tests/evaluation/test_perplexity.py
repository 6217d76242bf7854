"""Perplexity against Transformers' loss."""

from __future__ import annotations

import math

import pytest
import torch

from depthprune_runtime import InputError, perplexity
from depthprune_runtime.evaluation import logprobs
from depthprune_runtime.evaluation.perplexity import token_windows
from depthprune_runtime.texts import load_text, rows_joined

TEXT = load_text("builtin-test")[:20_000]


@pytest.mark.parametrize("rows", [False, True])
def test_perplexity_equals_the_loss_of_transformers(pico_llama, pico_runtime, rows):
    ids = pico_runtime.tokenizer.encode(rows_joined(TEXT) if rows else TEXT)
    losses = []
    for i in range(4):
        window = torch.tensor([ids[i * 48 : (i + 1) * 48]])
        with torch.no_grad():
            losses.append(float(pico_llama[0](window, labels=window).loss))
    result = perplexity(pico_runtime, TEXT, seq_len=48, windows=4, rows=rows)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)
    assert (result.tokens, result.windows, result.seq_len) == (4 * 47, 4, 48)


def test_all_windows_by_default_and_chunks_do_not_matter(pico_runtime, monkeypatch):
    text = TEXT[:2000]
    whole = perplexity(pico_runtime, text, seq_len=64)
    assert whole.windows == len(pico_runtime.tokenizer.encode(text)) // 64
    monkeypatch.setattr(logprobs, "_LOGIT_ROWS", 5)
    monkeypatch.setattr(logprobs, "_CPU_ROWS", 2)
    assert perplexity(pico_runtime, text, seq_len=64).perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def test_windows_follow_each_other():
    assert token_windows(list(range(25)), 8, None).tolist() == [list(range(8 * i, 8 * i + 8)) for i in range(3)]
    for ids, seq_len, windows, message in [
        (range(25), 8, 4, "4 windows of 8 need 32 tokens, got 25"),
        (range(7), 8, None, "1 windows of 8 need 8 tokens, got 7"),
        (range(25), 1, None, "seq_len: expected at least 2"),
        (range(25), 8, 0, "windows: expected at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            token_windows(list(ids), seq_len, windows)
