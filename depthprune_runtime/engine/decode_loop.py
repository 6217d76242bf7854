"""`DecodeLoop`: decode steps of a fixed set of requests, one after another, without the host between them.

The requests' state lives on the device; every step ends with `ops.next_tokens`, which chooses tokens, greedy or drawn
at a temperature by numbers that came with the batch, notices stop tokens and sets up the next step. The host hands over
a batch, launches the steps and reads all their tokens once. On a GPU the step is a CUDA graph, captured once per
bucket: the number of rows rounded up to a power of two, the width of the block tables likewise, and whether any row
draws; rows too many hold no request. Elsewhere the same ops run one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.model.fused_step import FusedStep, inert_state, missing_ops

Ints = npt.NDArray[np.int64]

MAX_ROWS = 64  # more requests in a step go through the ops of a prefill
MAX_STEPS = 16  # tokens a request that the host may be behind
_MAX_STOP_IDS = 16
_MIN_WIDTH = 64  # kv_blocks: 1024 tokens of 16
_log = logging.getLogger("depthprune_runtime")


@dataclass(frozen=True)
class Rows:
    """A batch of B requests with one new token each."""

    ids: Ints  # [B]
    positions: Ints  # [B]
    tables: Ints  # [B, M] kv_blocks, with room for all steps
    stop_ids: list[list[int]]  # B of them
    temperatures: list[float]  # B of them, 0: greedy
    uniform: npt.NDArray[np.float64] | None = None  # [steps, B], where a temperature is not 0


def build_decode_loop(decoder: Decoder, cache: KVCache) -> DecodeLoop | None:
    """The loop over `decoder`; None where another path serves: on the CPU, and on a GPU without the kernels."""
    if decoder.device.type != "cuda":
        return None
    missing = missing_ops(decoder)
    if missing:
        _log.warning(
            "decode runs op by op, without CUDA graphs: no CUDA implementation of %s; install triton and build the "
            "extension where nvcc is",
            ", ".join(missing),
        )
        return None
    return DecodeLoop(decoder, cache)


class DecodeLoop:
    """Decode over `decoder` and its KV cache; at most MAX_ROWS requests, at most MAX_STEPS steps a call."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        size = cache.kv_block_size
        self._decoder = decoder
        self._kv_block_size = size
        self._most_blocks = min(cache.num_kv_blocks, -(-decoder.spec.max_position_embeddings // size))
        self._step = FusedStep(
            decoder, cache.pairs, min(decoder.spec.max_position_embeddings, self._most_blocks * size)
        )
        self._buckets: dict[tuple[int, int, bool], _Bucket] = {}
        self._pool: Any = None  # graphs never run side by side, so they share their memory

    def fits(self, num_rows: int, stop_ids: list[list[int]] | None = None) -> bool:
        return num_rows <= MAX_ROWS and all(len(s) <= _MAX_STOP_IDS for s in stop_ids or [])

    def logits(self, rows: Rows) -> Tensor:  # [B, V], valid until the next call
        """One step, for a sampler of the caller's."""
        bucket = self._load(rows)
        bucket.replay()
        return bucket.logits[: len(rows.ids)]

    def tokens(self, rows: Rows, steps: int) -> Ints:  # [steps, B]
        """The next `steps` tokens; -1 for logits that are not finite. After a row's end they mean nothing."""
        assert 1 <= steps <= MAX_STEPS
        bucket = self._load(rows)
        for _ in range(steps):
            bucket.replay()
        found: Ints = bucket.tokens[:steps, : len(rows.ids)].cpu().numpy()
        return found

    def _load(self, rows: Rows) -> _Bucket:
        """Put `rows` into the buffers of their bucket."""
        count, width = rows.tables.shape
        batch = 1 << (count - 1).bit_length()
        wide = min(max(_MIN_WIDTH, 1 << (width - 1).bit_length()), max(width, self._most_blocks))
        key = (batch, wide, rows.uniform is not None)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(self._run, *key, self._decoder.device)
            if self._decoder.device.type == "cuda":
                self._pool = bucket.capture(self._pool)
        size = self._kv_block_size
        slots = rows.tables[np.arange(count), rows.positions // size] * size + rows.positions % size
        bucket.load(rows, slots)
        return bucket

    def _run(self, bucket: _Bucket) -> Tensor:
        state = bucket.state
        logits, best, candidates = self._step.run(state)
        drawn = None
        if bucket.draws:
            drawn = ops.draw_tokens(logits, bucket.temperatures, bucket.uniform, bucket.counts)
        ops.next_tokens(
            best, candidates, drawn, bucket.stop_ids, state.block_tables, self._kv_block_size,
            state.ids, state.positions, state.slots, state.context_lens, bucket.counts, bucket.tokens,
        )  # fmt: skip
        return logits


class _Bucket:
    """State of `batch` rows at addresses that never change, and the step over it, as a graph where it was captured."""

    def __init__(
        self, run: Callable[[_Bucket], Tensor], batch: int, width: int, draws: bool, device: torch.device
    ) -> None:
        self._run = run
        self.draws = draws
        # one tensor, so that a batch arrives in one copy: five columns of state, stop ids, block tables
        self._packed = torch.zeros(batch, 5 + _MAX_STOP_IDS + width, dtype=torch.int64, device=device)
        self._host = torch.zeros(self._packed.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.state = inert_state(batch, width, device)
        self.stop_ids = torch.full((batch, _MAX_STOP_IDS), -1, dtype=torch.int64, device=device)
        self.counts = torch.zeros(batch, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(MAX_STEPS, batch, dtype=torch.int64, device=device)
        self.temperatures = torch.zeros(batch, dtype=torch.float32, device=device)
        self.uniform = torch.zeros(MAX_STEPS, batch, dtype=torch.float64, device=device)
        self.logits = torch.empty(0, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, pool: Any) -> Any:
        """Record the step over rows that hold no request; returns the memory pool of the graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels; a graph must not see that
            self._run(self)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.logits = self._run(self)
        self._graph = graph
        return graph.pool()

    def load(self, rows: Rows, slots: Ints) -> None:
        """Bring a batch to the device. The host must have read what the steps before gave: it writes their buffer."""
        count, width = rows.tables.shape
        first = 5 + _MAX_STOP_IDS
        host = self._host.numpy()
        host[:] = 0
        host[:, 2] = -1
        host[:, 3] = 1
        host[:, 5:first] = -1
        for column, values in enumerate((rows.ids, rows.positions, slots, rows.positions + 1)):
            host[:count, column] = values
        for i, ids in enumerate(rows.stop_ids):
            host[i, 5 : 5 + len(ids)] = ids
        host[:count, first : first + width] = rows.tables
        self._packed.copy_(self._host, non_blocking=True)
        state = self.state
        columns = (state.ids, state.positions, state.slots, state.context_lens, self.counts)
        for column, target in enumerate(columns):
            target.copy_(self._packed[:, column])
        self.stop_ids.copy_(self._packed[:, 5:first])
        state.block_tables.copy_(self._packed[:, first:])
        if rows.uniform is not None:
            self.temperatures[:count].copy_(torch.tensor(rows.temperatures, dtype=torch.float32))
            self.uniform[: len(rows.uniform), :count].copy_(torch.from_numpy(rows.uniform))

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self.logits = self._run(self)
