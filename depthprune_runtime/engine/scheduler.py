"""`Scheduler`: which tokens of which requests the next step computes. Imports no torch.

A request computes tokens [num_computed, num_tokens); it samples in the step that reaches the end. One left is a
decode, more are a prefill, in chunks. A step takes

1. every running request with one token left (decode first: they never wait for a prefill),
2. chunks of running prefills, then of requests newly admitted, in line, within `max_num_batched_tokens`.

The line. Every output has the key `arrival + priority_weight * priority`, smaller is sooner. So it is first come,
first served within a priority, lower priorities go first, and nothing starves: a request is overtaken by at most
`priority_weight` later ones per level of priority. Admission keeps to the line: the first that does not fit blocks
those behind it.

Memory. An admitted request gets kv_blocks for all tokens it has; each decode may need one more. If there is
none, the running request last in line is preempted: its kv_blocks are freed, and it goes back to its place in line,
later to recompute prompt and output (its sampler is not touched). The first in line is never preempted, and fits
alone (`add` refuses what does not), so it ends, and so does everything. Admission leaves one free kv_block per running
request, which keeps a preempted request from bouncing. A waiting request never preempts a running one.
"""

from __future__ import annotations

import heapq
from bisect import insort
from typing import NamedTuple

from depthprune_runtime.engine.errors import EngineFull
from depthprune_runtime.engine.kv_blocks import KVBlockPool
from depthprune_runtime.engine.request import Request
from depthprune_runtime.errors import InputError

PRIORITY_WEIGHT = 1000  # later requests that may overtake, per level of priority


class Chunk(NamedTuple):
    """Tokens [start, start + length) of a request; samples: whether they reach its end."""

    request: Request
    start: int
    length: int
    samples: bool


def _key(request: Request) -> tuple[int, int]:
    return request.key


class Scheduler:
    """Requests waiting and running, over a pool of kv_blocks.

    max_num_seqs: outputs running at once; max_num_batched_tokens: tokens in a step; max_waiting: outputs in the
    waiting queue (None: any number); preempted ones go back to it regardless.
    """

    def __init__(
        self,
        pool: KVBlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int | None = None,
        priority_weight: int = PRIORITY_WEIGHT,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs >= 1, "every running request decodes in every step"
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_waiting = max_waiting
        self.priority_weight = priority_weight
        self.running: list[Request] = []  # in line
        self.num_waiting = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of admitted requests, recomputed outputs included
        self.num_cached_tokens = 0  # of those, found in the cache
        self._waiting: list[tuple[tuple[int, int], Request]] = []  # a heap; aborted ones leave when they come up
        self._arrivals = 0
        self._seats = list(range(max_num_seqs - 1, -1, -1))

    def add(self, requests: list[Request]) -> None:
        """Queue the outputs of one prompt, all or none; raises EngineFull, or InputError for what can never fit."""
        for request in requests:
            room = self.pool.num_kv_blocks * self.pool.kv_block_size
            if request.params.max_tokens is None:  # up to the context, or what of it the cache can hold
                request.max_new_tokens = max(1, min(request.max_new_tokens, room - request.num_prompt_tokens + 1))
            needed = self.pool.blocks_for(request.max_cached_tokens)
            if needed > self.pool.num_kv_blocks:
                raise InputError(
                    f"request {request.request_id}: {request.num_prompt_tokens} prompt and up to "
                    f"{request.max_new_tokens} new tokens never fit into the KV cache of {room} tokens; shorten "
                    "the prompt, lower max_tokens or raise kv_memory"
                )
        if self.max_waiting is not None:
            if len(requests) > self.max_waiting:
                raise InputError(f"n: expected at most max_waiting {self.max_waiting}, got {len(requests)}")
            if self.num_waiting + len(requests) > self.max_waiting:
                raise EngineFull(
                    f"the waiting queue holds {self.num_waiting} of at most {self.max_waiting} outputs "
                    f"(max_waiting), and {len(requests)} more were asked for; try again later"
                )
        for request in requests:
            request.arrival = self._arrivals
            self._arrivals += 1
            request.key = (request.arrival + self.priority_weight * request.priority, request.arrival)
            self._wait(request)

    def _wait(self, request: Request) -> None:
        heapq.heappush(self._waiting, (request.key, request))
        self.num_waiting += 1

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running) or self.num_waiting > 0

    def schedule(self) -> list[Chunk]:
        """The next step; its tokens count as computed from here on. Empty only if there is nothing to do."""
        chunks: list[Chunk] = []
        prefills: list[Request] = []
        preempted = self._schedule_decodes(chunks, prefills)
        budget = self.max_num_batched_tokens - len(chunks)
        for request in prefills:
            if budget == 0:
                break
            if request.seat >= 0:  # not preempted by a decode
                budget -= self._take(request, budget, chunks)
        while not preempted and budget > 0 and (admitted := self._admit()) is not None:
            budget -= self._take(admitted, budget, chunks)
        assert chunks or not self.has_unfinished, "the first in line must always fit"
        return chunks

    def _schedule_decodes(self, chunks: list[Chunk], prefills: list[Request]) -> bool:
        """Whether something was preempted. In line, so a victim, last in line, has no chunk yet."""
        size = self.pool.kv_block_size
        before = self.num_preemptions
        for request in list(self.running):
            if request.seat < 0:  # preempted a moment ago
                continue
            start = request.num_computed
            if len(request.token_ids) - start != 1:
                prefills.append(request)
                continue
            table = request.table
            assert table is not None
            if start % size == 0:
                while not self.pool.grow(table, start + 1):
                    victim = self.running[-1]
                    self._preempt(victim)
                    if victim is request:
                        break
                if request.seat < 0:
                    continue
            elif start % size == size - 1:
                self.pool.publish(table, request.token_ids, start + 1)
            request.num_computed = start + 1
            chunks.append(Chunk(request, start, 1, True))
        return self.num_preemptions > before

    def _take(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        start = request.num_computed
        length = min(budget, len(request.token_ids) - start)
        end = request.num_computed = start + length
        assert request.table is not None
        self.pool.publish(request.table, request.token_ids, end)
        chunks.append(Chunk(request, start, length, end == len(request.token_ids)))
        return length

    def reserve(self, chunks: list[Chunk], steps: int) -> bool:
        """Room for `steps` decode steps of `chunks`, the one scheduled among them, if nobody else is to be served."""
        if self.num_waiting or len(chunks) != len(self.running) or not all(c.samples and c.length == 1 for c in chunks):
            return False
        tables = [(c.request.table, c.start + steps) for c in chunks]
        missing = sum(self.pool.blocks_for(end) - len(t.kv_blocks) for t, end in tables if t is not None)
        return missing <= self.pool.num_free and all(self.pool.grow(t, end) for t, end in tables if t is not None)

    def catch_up(self, request: Request) -> None:
        """Tell of a running request that all its tokens but the last were computed, in steps that nobody scheduled."""
        assert request.table is not None
        request.num_computed = len(request.token_ids) - 1
        self.pool.publish(request.table, request.token_ids, request.num_computed)

    def _admit(self) -> Request | None:
        """Move the first in line to the running requests, if there is a seat and memory."""
        while self._waiting and self._waiting[0][1].finished:
            heapq.heappop(self._waiting)
        if not self._waiting or not self._seats:
            return None
        request = self._waiting[0][1]
        if request.blocked_at == self.pool.num_releases:
            return None
        allocated = self.pool.allocate(request.token_ids, reserve=len(self.running))
        if allocated is None:
            request.blocked_at = self.pool.num_releases
            return None
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        request.table, request.num_computed = allocated
        self.num_prompt_tokens += request.num_tokens
        self.num_cached_tokens += request.num_computed
        if request.num_output_tokens == 0:
            request.num_cached_tokens = request.num_computed
        request.seat = self._seats.pop()
        insort(self.running, request, key=_key)
        return request

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self.num_preemptions += 1
        self._wait(request)

    def _leave(self, request: Request) -> None:
        """Give up seat and kv_blocks."""
        assert request.table is not None
        self.running.remove(request)
        self.pool.release(request.table)
        self._seats.append(request.seat)
        request.table = None
        request.num_computed = 0
        request.seat = -1

    def remove(self, request: Request, damaged: bool = False) -> None:
        """Take out a request that has just finished, running or waiting. damaged: nobody may reuse what it cached."""
        assert request.finished
        if request.table is None:
            self.num_waiting -= 1  # its entry in the heap goes when it comes up
            if self.num_waiting * 2 < len(self._waiting):
                self._waiting = [entry for entry in self._waiting if not entry[1].finished]
                heapq.heapify(self._waiting)
            return
        if damaged:
            self.pool.forget(request.table)
        self._leave(request)

    def check(self) -> None:
        """Assert the invariants. For tests."""
        tables = [r.table for r in self.running if r.table is not None]
        assert len(tables) == len(self.running) <= self.max_num_seqs
        self.pool.check(tables)
        assert self.running == sorted(self.running, key=_key)
        waiting = [r for _, r in self._waiting if not r.finished]
        assert len(waiting) == self.num_waiting
        assert all(r.table is None and r.seat < 0 for r in waiting)
        seats = [r.seat for r in self.running] + self._seats
        assert sorted(seats) == list(range(self.max_num_seqs)), "a seat is lost or taken twice"
        for r in self.running:
            assert r.table is not None
            assert r.num_computed <= len(r.table.kv_blocks) * self.pool.kv_block_size
