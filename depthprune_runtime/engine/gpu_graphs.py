"""`GpuGraphs`: decode steps of a fixed set of requests, one after another, without the host between them.

The requests' state lives on the device; every step ends with `ops.next_tokens`, which chooses tokens, greedy or drawn
at a temperature by numbers that came with the batch, notices stop tokens and sets up the next step. The host hands over
a batch, launches the steps and reads all their tokens once. On a GPU the step is a CUDA graph, captured once per
bucket: the number of rows rounded up to a power of two, the width of the block tables likewise, and whether any row
draws. Rows beyond the batch are padding, which writes nothing. Elsewhere the same ops run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.engine.decode_paths import MAX_STEPS, DecodeBatch, Ints
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.sampler import RequestSampler
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.model.steps.gpu import FusedStep, inert_state

MAX_ROWS = 64  # more requests in a step go through the ops of a prefill
_MAX_STOP_IDS = 16
_MIN_WIDTH = 64  # kv_blocks: 1024 tokens of 16


class GpuGraphs:
    """Decode over `decoder` and its KV cache."""

    max_requests = MAX_ROWS
    max_steps = MAX_STEPS

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

    @staticmethod
    def refuses(decoder: Decoder) -> str | None:
        return FusedStep.refuses(decoder)

    def takes(self, requests: Sequence[Request], samplers: Sequence[RequestSampler]) -> bool:
        """Greedy requests and those drawn at a temperature alone, with few stop tokens."""
        return (
            len(requests) <= MAX_ROWS
            and all(s.plain and s.params.logprobs is None for s in samplers)
            and all(len(r.end_ids) <= _MAX_STOP_IDS for r in requests)
        )

    def logits(self, batch: DecodeBatch) -> Tensor:  # [B, V], valid until the next call
        bucket = self._load(batch)
        bucket.replay()
        return bucket.logits[: len(batch.ids)]

    def tokens(self, batch: DecodeBatch, steps: int) -> Ints:  # [steps, B]
        assert 1 <= steps <= MAX_STEPS
        bucket = self._load(batch)
        for _ in range(steps):
            bucket.replay()
        found: Ints = bucket.tokens[:steps, : len(batch.ids)].cpu().numpy()
        return found

    def _load(self, batch: DecodeBatch) -> _Bucket:
        """Put `batch` into the buffers of its bucket."""
        count, width = batch.tables.shape
        rows = 1 << (count - 1).bit_length()
        wide = min(max(_MIN_WIDTH, 1 << (width - 1).bit_length()), max(width, self._most_blocks))
        key = (rows, wide, batch.uniform is not None)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(self._run, *key, self._decoder.device)
            if self._decoder.device.type == "cuda":
                self._pool = bucket.capture(self._pool)
        bucket.load(batch, batch.slots(self._kv_block_size))
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
    """State of `rows` rows at addresses that never change, and the step over it, as a graph where it was captured."""

    def __init__(
        self, run: Callable[[_Bucket], Tensor], rows: int, width: int, draws: bool, device: torch.device
    ) -> None:
        self._run = run
        self.draws = draws
        # one tensor, so that a batch arrives in one copy: five columns of state, stop ids, block tables
        self._packed = torch.zeros(rows, 5 + _MAX_STOP_IDS + width, dtype=torch.int64, device=device)
        self._host = torch.zeros(self._packed.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.state = inert_state(rows, width, device)
        self.stop_ids = torch.full((rows, _MAX_STOP_IDS), -1, dtype=torch.int64, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(MAX_STEPS, rows, dtype=torch.int64, device=device)
        self.temperatures = torch.zeros(rows, dtype=torch.float32, device=device)
        self.uniform = torch.zeros(MAX_STEPS, rows, dtype=torch.float64, device=device)
        self.logits = torch.empty(0, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, pool: Any) -> Any:
        """Record the step over padding; returns the memory pool of the graph."""
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

    def load(self, batch: DecodeBatch, slots: Ints) -> None:
        """Bring a batch to the device. The host must have read what the steps before gave: it writes their buffer."""
        count, width = batch.tables.shape
        first = 5 + _MAX_STOP_IDS
        host = self._host.numpy()
        host[:] = 0
        host[:, 2] = -1
        host[:, 3] = 1
        host[:, 5:first] = -1
        for column, values in enumerate((batch.ids, batch.positions, slots, batch.positions + 1)):
            host[:count, column] = values
        for i, ids in enumerate(batch.stop_ids):
            host[i, 5 : 5 + len(ids)] = ids
        host[:count, first : first + width] = batch.tables
        self._packed.copy_(self._host, non_blocking=True)
        state = self.state
        columns = (state.ids, state.positions, state.slots, state.context_lens, self.counts)
        for column, target in enumerate(columns):
            target.copy_(self._packed[:, column])
        self.stop_ids.copy_(self._packed[:, 5:first])
        state.block_tables.copy_(self._packed[:, first:])
        if batch.uniform is not None:
            self.temperatures[:count].copy_(torch.tensor(batch.temperatures, dtype=torch.float32))
            self.uniform[: len(batch.uniform), :count].copy_(torch.from_numpy(batch.uniform))

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self.logits = self._run(self)
