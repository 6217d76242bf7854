"""A model without tensors: it checks that every key and value that a step reads is where the tables say.

Slot contents are the beginnings they belong to; the next token is a function of the whole beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.scheduler import Chunk, Scheduler


def next_token(ids: Sequence[int]) -> int:
    return hashlib.blake2b(repr(list(ids)).encode()).digest()[0] % 5


def solo(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What a request must bring, whatever else runs."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


def request(prompt: Sequence[int], max_tokens: int, priority: int = 0, name: str = "r") -> Request:
    return Request(name, 0, prompt, SamplingParams(max_tokens=max_tokens), frozenset(), 10**9, None, priority)


class FakeModel:
    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.memory: dict[int, tuple[int, ...]] = {}

    def slot(self, request: Request, position: int) -> int:
        size = self.scheduler.pool.kv_block_size
        return request.table.kv_blocks[position // size] * size + position % size

    def step(self) -> list[Chunk]:
        """Schedule, write, read, sample; returns the chunks."""
        chunks = self.scheduler.schedule()
        self.scheduler.check()
        assert sum(c.length for c in chunks) <= self.scheduler.max_num_batched_tokens
        assert len({id(c.request) for c in chunks}) == len(chunks)
        written = [self.slot(r, p) for r, start, length, _ in chunks for p in range(start, start + length)]
        assert len(set(written)) == len(written), "two tokens of a step share a slot"
        for r, start, length, _ in chunks:
            for p in range(start, start + length):
                self.memory[self.slot(r, p)] = tuple(r.token_ids[: p + 1])
        for r, start, length, samples in chunks:
            for p in range(start + length):
                assert self.memory[self.slot(r, p)] == tuple(r.token_ids[: p + 1]), "read what is not its own"
            assert samples == (start + length == r.num_tokens)
        for r, _, _, samples in chunks:
            if samples:
                r.append(next_token(r.token_ids))
                if r.finished:
                    self.scheduler.remove(r)
        self.scheduler.check()
        return chunks

    def finish(self, most: int = 10**5) -> None:
        for _ in range(most):
            if not self.scheduler.has_unfinished:
                return
            assert self.step()
        raise AssertionError("it does not end")
