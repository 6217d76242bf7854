"""Decode paths: each says what the others say, refuses what it cannot run, and serves what it takes."""

from __future__ import annotations

import dataclasses
import logging
import sys

import numpy as np
import pytest
import random_decoder
import torch
from built import built
from specs import mixed_spec

from depthprune_runtime import SamplingParams
from depthprune_runtime.engine import runner
from depthprune_runtime.engine.decode_paths import CpuStep, DecodeBatch, DecodePath, OpByOp
from depthprune_runtime.engine.gpu_graphs import GpuGraphs
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.engine.request import Request
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.steps.cpu import DecodeStep

built()
CPU = torch.device("cpu")
PATHS = [CpuStep, GpuGraphs, OpByOp]
SPEC = mixed_spec()


def batch(count: int) -> DecodeBatch:
    """Tokens at the first positions of as many requests, in blocks that lie in any order."""
    tables = np.random.default_rng(0).permutation(40)[: 4 * count].reshape(count, 4)
    return DecodeBatch(np.arange(5, 5 + count), np.zeros(count, dtype=np.int64), tables, [[]] * count, [0.0] * count)


def greedy(tokens: int, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, **options)


def path_of(kind: type) -> DecodePath:
    return kind(random_decoder.decoder(SPEC), KVCache(SPEC, 40, 4, CPU, torch.float32))


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_tokens_and_logits_are_those_of_the_whole_text(kind, count):
    """Tokens in calls of up to four steps, then the logits of one more, against the decoder without a cache."""
    path, now = path_of(kind), batch(count)
    texts = [[token] for token in now.ids.tolist()]
    while len(texts[0]) < 9:
        found = path.tokens(now, min(4, path.max_steps))
        assert 1 <= len(found) <= 4
        for row in found:
            for text, token in zip(texts, row.tolist(), strict=True):
                text.append(token)
        ids, positions = np.array([t[-1] for t in texts]), np.full(count, len(texts[0]) - 1)
        now = DecodeBatch(ids, positions, now.tables, now.stop_ids, now.temperatures)
    logits = path.logits(now)
    decoder = random_decoder.decoder(SPEC)
    for row, text in zip(logits, texts, strict=True):
        assert tuple(text[1:]) == random_decoder.solo(SPEC, tuple(text[:1]), greedy(len(text) - 1))
        whole = decoder.logits(decoder.hidden_states(torch.tensor(text), packed([len(text)], CPU)))
        torch.testing.assert_close(row, whole[-1], rtol=1e-4, atol=1e-4)


DRAWN = SamplingParams(temperature=0.8, seed=1)
TAKEN_BY = {  # what a request asks for -> the paths whose `tokens` do it
    "greedy": (greedy(4), {CpuStep, GpuGraphs, OpByOp}),
    "drawn at a temperature": (DRAWN, {GpuGraphs}),
    "drawn among the likely": (dataclasses.replace(DRAWN, top_k=5), set()),
    "a repetition penalty": (greedy(4, repetition_penalty=1.2), set()),
    "logprobs": (greedy(4, logprobs=0), set()),
    "a stop string": (greedy(4, stop=["x"]), {GpuGraphs, OpByOp}),
    "few stop tokens": (greedy(4, stop_token_ids=list(range(16))), {CpuStep, GpuGraphs, OpByOp}),
    "many stop tokens": (greedy(4, stop_token_ids=list(range(17))), {CpuStep, OpByOp}),
}


@pytest.mark.parametrize("wish", TAKEN_BY)
def test_a_path_takes_what_its_tokens_do(wish):
    params, takers = TAKEN_BY[wish]
    paths = [path_of(kind) for kind in PATHS]

    def taken(count: int, params: SamplingParams) -> set[type]:
        requests = [Request(str(i), 0, (3,), params, frozenset(), 99, None) for i in range(count)]
        samplers = [random_decoder.sampler_of(params, (3,), i, SPEC.vocab_size) for i in range(count)]
        return {type(p) for p in paths if p.takes(requests, samplers)}

    assert taken(2, params) == takers
    if wish == "greedy":
        most = max(p.max_requests for p in paths if p.max_requests < sys.maxsize)
        assert taken(most + 1, params) == {OpByOp}


def test_what_cannot_run_is_refused_with_a_reason(monkeypatch):
    decoder = random_decoder.decoder(SPEC)
    assert CpuStep.refuses(decoder) is None and OpByOp.refuses(decoder) is None
    assert "no CPU implementation of" in GpuGraphs.refuses(decoder)
    monkeypatch.setattr("depthprune_runtime.model.steps.cpu.extension", lambda: None)
    assert CpuStep.refuses(decoder) == "the C++ extension is not in use"


def test_the_next_path_serves_and_the_log_says_so_once(monkeypatch, caplog):
    cache = KVCache(SPEC, 40, 4, CPU, torch.float32)
    decoder = random_decoder.decoder(SPEC)
    with caplog.at_level(logging.WARNING, "depthprune_runtime"):
        assert isinstance(runner.choose_path(decoder, cache), CpuStep)
        assert not caplog.records
        monkeypatch.setattr(DecodeStep, "refuses", staticmethod(lambda _: "it may not"))
        for _ in range(3):
            assert isinstance(runner.choose_path(decoder, cache), OpByOp)
    assert [r.getMessage() for r in caplog.records] == ["decode runs op by op: it may not"]


def test_batches_too_wide_for_the_path_go_through_the_ops(monkeypatch):
    """A path of two requests: with three running, it sees none of their steps, and says what it says alone."""
    monkeypatch.setattr(CpuStep, "takes", lambda *_: False)
    engine = random_decoder.engine(SPEC, kv_blocks=60)
    path = engine._runner._path
    path.max_requests = 2
    widths, plain = [], path.logits
    monkeypatch.setattr(path, "logits", lambda batch: widths.append(len(batch.ids)) or plain(batch))
    lengths = {"a": 4, "b": 9, "c": 12}
    for name, length in lengths.items():
        engine.add_request([7 + length], greedy(length), request_id=name)
    found: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert widths == [2] * 5 + [1] * 3
    for name, length in lengths.items():
        assert tuple(found[name]) == random_decoder.solo(SPEC, (7 + length,), greedy(length))
