"""`Runner`: turns one step of the scheduler into one batch and returns the logits to sample from.

All integers of a step (ids, positions, slots, bounds, lengths, block tables) are put together on the host and cross
to the device in one copy. Block tables are kept from step to step, a row per seat; a step adds what grew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from depthprune_runtime.engine.decode_loop import MAX_STEPS, Rows, build_decode_loop
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.sampler import RequestSampler
from depthprune_runtime.engine.scheduler import Chunk
from depthprune_runtime.model.batch import Batch, PagedContext
from depthprune_runtime.model.decode_step import build_decode_step
from depthprune_runtime.model.decoder import Decoder

Ints = npt.NDArray[np.int64]

AHEAD_SECONDS = 0.02  # on a CPU: how long a reader of the text or a new request may wait for the host


class _SeatTables:
    """Block table of every seat as one array, [max_num_seqs, M], brought up to date where it is used."""

    def __init__(self, max_num_seqs: int) -> None:
        self._array: Ints = np.zeros((max_num_seqs, 64), dtype=np.int64)
        self._filled: list[tuple[object, int]] = [(None, 0)] * max_num_seqs  # which table, and how much of it

    def rows(self, chunks: Sequence[Chunk]) -> Ints:  # [B, M]
        seats = []
        width = 0
        for request, _, _, _ in chunks:
            table, seat = request.table, request.seat
            assert table is not None
            owner, filled = self._filled[seat]
            count = len(table.kv_blocks)
            if owner is not table:
                filled = 0
            if owner is not table or filled != count:
                if count > self._array.shape[1]:
                    more = max(count, 2 * self._array.shape[1]) - self._array.shape[1]
                    self._array = np.pad(self._array, ((0, 0), (0, more)))
                self._array[seat, filled:count] = table.kv_blocks[filled:]
                self._filled[seat] = (table, count)
            seats.append(seat)
            width = max(width, count)
        return self._array[seats, :width]


class Runner:
    """A decoder with its KV cache."""

    def __init__(self, decoder: Decoder, cache: KVCache, max_num_seqs: int) -> None:
        self._decoder = decoder
        self._cache = cache
        self._tables = _SeatTables(max_num_seqs)
        self._step = build_decode_step(decoder, cache.pairs)
        self._loop = build_decode_loop(decoder, cache)

    @property
    def max_steps(self) -> int:
        """Most steps of `run_ahead`; 1 where the host is needed for every token."""
        return 1 if self._loop is None and self._step is None else MAX_STEPS

    def may_run_ahead(self, requests: Sequence[Request], samplers: Sequence[RequestSampler]) -> bool:
        """Whether `run_ahead` takes the batch: on a CPU greedy requests, whose ends do not hang on their text."""
        if not all(s.plain and s.params.logprobs is None for s in samplers):
            return False
        if self._loop is not None:
            return self._loop.fits(len(requests), [r.end_ids for r in requests])
        step = self._step
        if step is None or len(requests) > step.max_tokens:
            return False
        return all(s.plain_greedy and not s.params.stop_strings for s in samplers)

    def run_ahead(self, chunks: Sequence[Chunk], samplers: Sequence[RequestSampler], steps: int) -> Ints:
        """The next tokens, [N, R], of requests with one token to compute and room for `steps` in their tables.

        Only where `may_run_ahead`. -1: logits that are not finite; what follows a request's end means nothing. The host
        looks at nothing in between. N is `steps` on a GPU; on a CPU, where a step too many costs as much as any, it
        ends with the first request that does, and after AHEAD_SECONDS.
        """
        stop_ids = [c.request.end_ids for c in chunks]
        if self._loop is None:
            return self._greedy_ahead(chunks, stop_ids, steps)
        temperatures = [s.params.temperature for s in samplers]
        uniform = None
        if any(temperatures):
            draws = [[s.draw() if s.params.temperature else 0.0 for _ in range(steps)] for s in samplers]
            uniform = np.array(draws).T.copy()
        return self._loop.tokens(self._rows(chunks, stop_ids, temperatures, uniform), steps)

    def _greedy_ahead(self, chunks: Sequence[Chunk], stop_ids: list[list[int]], steps: int) -> Ints:
        assert self._step is not None
        stops = np.full((len(chunks), max(map(len, stop_ids))), -1, dtype=np.int64)
        for row, ends in zip(stops, stop_ids, strict=True):
            row[: len(ends)] = ends
        rows = self._rows(chunks, stop_ids, [0.0] * len(chunks))
        ids, positions, tables, stop = map(torch.from_numpy, (rows.ids, rows.positions, rows.tables, stops))
        found: Ints = self._step.greedy_tokens(ids, positions, tables, stop, steps, AHEAD_SECONDS).numpy()
        return found

    def _rows(
        self,
        chunks: Sequence[Chunk],
        stop_ids: list[list[int]],
        temperatures: list[float],
        uniform: npt.NDArray[np.float64] | None = None,
    ) -> Rows:
        ids = np.array([c.request.token_ids[c.start] for c in chunks], dtype=np.int64)
        starts = np.array([c.start for c in chunks], dtype=np.int64)
        return Rows(ids, starts, self._tables.rows(chunks), stop_ids, temperatures, uniform)

    def run(self, chunks: Sequence[Chunk]) -> Tensor | None:  # [R, V]
        """Compute the chunks' tokens; logits of those that sample, in order, or None if there are none."""
        if self._loop is not None and self._loop.fits(len(chunks)) and all(c.samples and c.length == 1 for c in chunks):
            return self._loop.logits(self._rows(chunks, [[] for _ in chunks], [0.0] * len(chunks)))
        ids: list[int] = []
        for request, start, length, _ in chunks:
            if length == 1:
                ids.append(request.token_ids[start])
            else:
                ids += request.token_ids[start : start + length]
        starts = np.array([c.start for c in chunks], dtype=np.int64)
        lengths = np.array([c.length for c in chunks], dtype=np.int64)
        bounds = np.zeros(len(chunks) + 1, dtype=np.int64)
        np.cumsum(lengths, out=bounds[1:])
        positions = np.arange(len(ids)) + np.repeat(starts - bounds[:-1], lengths)
        tables = self._tables.rows(chunks)
        size = self._cache.kv_block_size
        slots = tables[np.repeat(np.arange(len(chunks)), lengths), positions // size] * size + positions % size
        sampling = [c.samples for c in chunks]
        select = bounds[1:][sampling] - 1 if any(sampling) else bounds[1:2] - 1  # at least one, for the final norm
        ends = starts + lengths
        parts = (np.array(ids, dtype=np.int64), positions, slots, bounds, ends, select, tables.reshape(-1))
        token_ids, positions_, slots_, bounds_, ends_, select_, tables_ = self._to_device(parts)
        paged = PagedContext(slots_, tables_.view(tables.shape), ends_, fresh=not starts.any())
        batch = Batch(positions_, bounds_, int(ends.max()) - 1, paged)
        step = self._step
        if step is not None and len(ids) == len(chunks) <= step.max_tokens and all(sampling):
            return step.logits(token_ids, batch)
        hidden = self._decoder.hidden_states(token_ids, batch, self._cache.pairs, select=select_)
        return self._decoder.logits(hidden) if any(sampling) else None

    def _to_device(self, parts: Sequence[Ints]) -> list[Tensor]:
        """Each part as int64 on the device, in one copy."""
        whole = torch.from_numpy(np.concatenate(parts))
        if self._decoder.device.type == "cuda":
            whole = whole.pin_memory().to(self._decoder.device, non_blocking=True)
        elif self._decoder.device.type != "cpu":
            whole = whole.to(self._decoder.device)
        return list(whole.split([p.size for p in parts]))
