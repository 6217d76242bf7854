"""Several greedy steps in one call: the tokens of as many single steps, and where it ends."""

from __future__ import annotations

import pytest
import random_decoder
import specs
import torch
from built import built

from depthprune_runtime import ops
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.model.batch import PagedContext, packed
from depthprune_runtime.model.steps.cpu import DecodeStep
from depthprune_runtime.spec import DecoderSpec

built()
CPU = torch.device("cpu")
BLOCK = 4
LONG = 60.0  # seconds


def new_step(spec: DecoderSpec) -> DecodeStep:
    """Over a cache of 32 kv_blocks, filled with the same numbers every time."""
    cache = KVCache(spec, 32, BLOCK, CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for part in (part for pair in cache.pairs for part in pair or ()):
        part.copy_(torch.randn(part.shape, generator=generator))
    return DecodeStep(random_decoder.decoder(spec), cache.pairs)


def tables_of(count: int) -> torch.Tensor:
    return torch.randperm(32, generator=torch.Generator().manual_seed(3))[: count * 8].view(count, 8)


def ahead(step: DecodeStep, ids, positions, stop_ids=None, steps=12, seconds=LONG) -> list[list[int]]:
    stops = torch.full((len(ids), 0), -1) if stop_ids is None else torch.tensor(stop_ids)
    tables = tables_of(len(ids))
    return step.greedy_tokens(torch.tensor(ids), torch.tensor(positions), tables, stops, steps, seconds).tolist()


def one_by_one(spec: DecoderSpec, ids, positions, steps=12) -> list[list[int]]:
    step, tables, found = new_step(spec), tables_of(len(ids)), []
    for i in range(steps):
        starts = [p + i for p in positions]
        slots = torch.tensor([int(tables[b, s // BLOCK]) * BLOCK + s % BLOCK for b, s in enumerate(starts)])
        paged = PagedContext(slots, tables, torch.tensor(starts) + 1, False)
        ids = ops.greedy(step.logits(torch.tensor(ids), packed([1] * len(ids), CPU, starts, paged))).tolist()
        found.append(ids)
    return found


@pytest.mark.parametrize("kinds", ["fafafa", "aaa", "ff"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_tokens_are_those_of_single_steps(kinds, batch):
    spec = specs.mixed_spec(kinds=kinds)
    ids, positions = [7, 3, 50, 21][:batch], [5, 0, 14, 3][:batch]
    found = ahead(new_step(spec), ids, positions)
    assert found == one_by_one(spec, ids, positions)
    assert len({tuple(row) for row in found}) > 2


def test_ends_with_the_step_in_which_a_request_ends():
    spec = specs.mixed_spec()
    whole = one_by_one(spec, [7, 3], [5, 0])
    first = [row[0] for row in whole]
    stop = first[4]
    steps = first.index(stop) + 1
    assert [row[1] for row in whole[:steps]].count(stop) == 0, "the other request would end by it too"
    assert ahead(new_step(spec), [7, 3], [5, 0], [[-1, stop], [-1, -1]]) == whole[:steps]
    other = next(t for t in range(spec.vocab_size) if t not in {row[1] for row in whole})
    assert ahead(new_step(spec), [7, 3], [5, 0], [[-1], [other]]) == whole


def test_ends_after_the_time_it_has():
    spec = specs.mixed_spec()
    assert ahead(new_step(spec), [7], [5], seconds=0.0) == one_by_one(spec, [7], [5])[:1]


def test_logits_that_are_not_finite_end_it():
    spec = specs.plain_spec(1)
    weights = {k: v.clone() for k, v in random_decoder.tensors(spec).items()}
    weights["norm.weight"][0] = torch.inf
    decoder = type(random_decoder.decoder(spec))(spec, weights.__getitem__, CPU, torch.float32)
    step = DecodeStep(decoder, KVCache(spec, 32, BLOCK, CPU, torch.float32).pairs)
    assert ahead(step, [7, 3], [0, 0]) == [[-1, -1]]


def test_bad_places_are_refused():
    step = new_step(specs.plain_spec(1))
    tables = tables_of(1)

    def run(ids=(1,), position=0, table=tables, steps=4, stops=((-1,),)):
        step.greedy_tokens(torch.tensor(ids), torch.tensor([position]), table, torch.tensor(stops), steps, LONG)

    run(position=28)
    bad = {
        "ids": {"ids": (64,)},
        "context_lens": {"position": 29},
        "positions": {"position": -1},
        "block_tables": {"table": torch.full((1, 8), 32)},
        "stop_ids": {"stops": ((-1,), (-1,))},
        "steps": {"steps": 0},
    }
    for what, options in bad.items():
        with pytest.raises((ValueError, IndexError), match=what):
            run(**options)
