"""`Runner`: turns one step of the scheduler into one batch, and gives it to the path that computes it.

Block tables are kept from step to step, a row per seat; a step adds what grew.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from depthprune_runtime.engine.decode_paths import CpuStep, DecodeBatch, DecodePath, Ints, OpByOp
from depthprune_runtime.engine.gpu_graphs import GpuGraphs
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.sampler import RequestSampler
from depthprune_runtime.engine.scheduler import Chunk
from depthprune_runtime.model.decoder import Decoder

FASTEST: Mapping[str, type[CpuStep] | type[GpuGraphs]] = {"cpu": CpuStep, "cuda": GpuGraphs}  # by kind of device
_log = logging.getLogger("depthprune_runtime")


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def choose_path(decoder: Decoder, cache: KVCache) -> DecodePath:
    """The fastest path that does not refuse `decoder`; why it is not the device's own is said once in the log."""
    fastest = FASTEST.get(decoder.device.type)
    reason = "no faster path for this device" if fastest is None else fastest.refuses(decoder)
    if fastest is not None and reason is None:
        return fastest(decoder, cache)
    _say_once(f"decode runs op by op: {reason}")
    return OpByOp(decoder, cache)


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
        self._tables = _SeatTables(max_num_seqs)
        self._path = choose_path(decoder, cache)
        self._op_by_op = OpByOp(decoder, cache)  # prompts, and batches that are too wide for the path

    @property
    def max_steps(self) -> int:
        """Most steps of `run_ahead`; 1 where the host is needed for every token."""
        return self._path.max_steps

    def may_run_ahead(self, requests: Sequence[Request], samplers: Sequence[RequestSampler]) -> bool:
        """Whether `run_ahead` takes the batch."""
        return self._path.takes(requests, samplers)

    def run_ahead(self, chunks: Sequence[Chunk], samplers: Sequence[RequestSampler], steps: int) -> Ints:
        """The next tokens, [N, R], of requests with one token to compute and room for `steps` in their tables.

        Only where `may_run_ahead`; see `DecodePath.tokens`. The host looks at nothing in between.
        """
        temperatures = [s.params.temperature for s in samplers]
        uniform = None
        if any(temperatures):
            draws = [[s.draw() if s.params.temperature else 0.0 for _ in range(steps)] for s in samplers]
            uniform = np.array(draws).T.copy()
        stop_ids = [c.request.end_ids for c in chunks]
        return self._path.tokens(self._batch(chunks, stop_ids, temperatures, uniform), steps)

    def run(self, chunks: Sequence[Chunk]) -> Tensor | None:  # [R, V]
        """Compute the chunks' tokens; logits of those that sample, in order, or None if there are none."""
        if all(c.samples and c.length == 1 for c in chunks):
            path = self._path if len(chunks) <= self._path.max_requests else self._op_by_op
            return path.logits(self._batch(chunks, [[] for _ in chunks], [0.0] * len(chunks)))
        ids: list[int] = []
        for request, start, length, _ in chunks:
            ids += request.token_ids[start : start + length]
        starts = np.array([c.start for c in chunks], dtype=np.int64)
        lengths = np.array([c.length for c in chunks], dtype=np.int64)
        samples = np.array([c.samples for c in chunks], dtype=bool)
        tables = self._tables.rows(chunks)
        return self._op_by_op.compute(np.array(ids, dtype=np.int64), starts, lengths, tables, samples)

    def _batch(
        self,
        chunks: Sequence[Chunk],
        stop_ids: list[list[int]],
        temperatures: list[float],
        uniform: npt.NDArray[np.float64] | None = None,
    ) -> DecodeBatch:
        ids = np.array([c.request.token_ids[c.start] for c in chunks], dtype=np.int64)
        starts = np.array([c.start for c in chunks], dtype=np.int64)
        return DecodeBatch(ids, starts, self._tables.rows(chunks), stop_ids, temperatures, uniform)
