"""Hidden states of some tokens only: the same as among all, the same cache, and no more work than they need."""

from __future__ import annotations

import dataclasses

import pytest
import random_decoder
import specs
import torch

from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.model.batch import Batch, PagedContext, packed
from depthprune_runtime.spec import AttentionSpec, DecoderSpec

CPU = torch.device("cpu")
BLOCK = 4
LENGTHS = [9, 1, 6]
SELECTIONS = [[8, 9, 15], [15], [3], [2, 8, 9, 12, 15], list(range(15, -1, -1))]


def with_qk_norm(spec: DecoderSpec) -> DecoderSpec:
    changed = (dataclasses.replace(s, qk_norm=True) if isinstance(s, AttentionSpec) else s for s in spec.sublayers)
    return dataclasses.replace(spec, sublayers=tuple(changed))


SPECS = {
    "ends in FFN": specs.mixed_spec(kinds="aFaafF"),
    "ends in attention": specs.mixed_spec(kinds="aFa"),
    "no attention": specs.mixed_spec(kinds="fF"),
    "window": specs.mixed_spec(window=5),
    "q/k-norm": with_qk_norm(specs.mixed_spec()),
}


def paged(spec: DecoderSpec, starts: list[int]) -> tuple[Batch, KVCache]:
    """New tokens of three requests over scattered kv_blocks, which hold random tokens before `starts`."""
    generator = torch.Generator().manual_seed(1)
    ends = [s + n for s, n in zip(starts, LENGTHS, strict=True)]
    width = -(-max(ends) // BLOCK)
    cache = KVCache(spec, width * len(LENGTHS), BLOCK, CPU, torch.float32)
    for pair in cache.pairs:
        for side in pair or ():
            side.copy_(torch.randn(side.shape, generator=generator))
    tables = torch.randperm(width * len(LENGTHS), generator=generator).view(len(LENGTHS), width)
    slots = [
        int(tables[b, p // BLOCK]) * BLOCK + p % BLOCK
        for b, (start, end) in enumerate(zip(starts, ends, strict=True))
        for p in range(start, end)
    ]
    context = PagedContext(torch.tensor(slots), tables, torch.tensor(ends), fresh=not any(starts))
    return packed(LENGTHS, CPU, starts, context), cache


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("starts", [None, [0, 0, 0], [7, 0, 13]], ids=["no cache", "fresh", "continued"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_selected_tokens_are_those_among_all(spec, starts, selection):
    model = random_decoder.decoder(spec)
    ids = torch.arange(sum(LENGTHS)) % spec.vocab_size
    select = torch.tensor(selection)
    found, caches = [], []
    for chosen in (None, select):
        batch, cache = (packed(LENGTHS, CPU), None) if starts is None else paged(spec, starts)
        with torch.inference_mode():
            hidden = model.hidden_states(ids, batch, cache.pairs if cache else None, chosen)
        found.append(hidden[select] if chosen is None else hidden)
        caches.append([side for pair in cache.pairs for side in pair or ()] if cache else [])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_follows_the_last_attention_runs_for_the_selected_alone(spec, monkeypatch):
    model = random_decoder.decoder(spec)
    rows: list[int] = []
    for sublayer in model.sublayers:
        monkeypatch.setattr(sublayer, "project", _counting(sublayer.project, rows))
    batch, cache = paged(spec, [0, 0, 0])
    with torch.inference_mode():
        model.hidden_states(torch.zeros(16, dtype=torch.int64), batch, cache.pairs, torch.tensor([8, 15]))
    kinds = [isinstance(s, AttentionSpec) for s in spec.sublayers]
    last = len(kinds) - 1 - kinds[::-1].index(True) if any(kinds) else 0
    assert rows == [16] * last + [2] * (len(kinds) - last)


def _counting(project, rows):
    def counted(inner):
        rows.append(inner.shape[0])
        return project(inner)

    return counted
