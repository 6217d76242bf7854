"""`DecodePath`: a way to compute the next tokens of requests that have one token each to compute.

    CpuStep      the whole step in one C++ call (`model.steps.cpu`), several greedy steps after one another
    GpuGraphs    the fused ops in CUDA graphs (`engine.gpu_graphs`), several steps, greedy or drawn
    OpByOp       the decoder's methods: any device, and prompts as well

A path that cannot run a decoder refuses it with a reason, and `OpByOp` serves. Arrays stay on the host until a path
needs them elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from depthprune_runtime import ops
from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.sampler import RequestSampler
from depthprune_runtime.model.batch import Batch, PagedContext
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.model.steps.cpu import DecodeStep

Ints = npt.NDArray[np.int64]

MAX_STEPS = 16  # tokens a request that the host may be behind
AHEAD_SECONDS = 0.02  # on a CPU: how long a reader of the text or a new request may wait for the host


@dataclass(frozen=True)
class DecodeBatch:
    """B requests with one new token each."""

    ids: Ints  # [B]
    positions: Ints  # [B]
    tables: Ints  # [B, M] kv_blocks, with room for all steps
    stop_ids: list[list[int]]  # B of them
    temperatures: list[float]  # B of them, 0: greedy
    uniform: npt.NDArray[np.float64] | None = None  # [steps, B], where a temperature is not 0

    def slots(self, kv_block_size: int) -> Ints:  # [B]
        """Where in the KV cache the tokens go."""
        return slots_of(self.tables, np.arange(len(self.ids)), self.positions, kv_block_size)


class DecodePath(Protocol):
    """Computes decode steps of a decoder over its KV cache."""

    @staticmethod
    def refuses(decoder: Decoder) -> str | None:
        """Why this path cannot run `decoder`; None if it can."""

    @property
    def max_requests(self) -> int:
        """Most requests of a batch."""

    @property
    def max_steps(self) -> int:
        """Most steps of `tokens`; 1 where the host is needed for every token."""

    def takes(self, requests: Sequence[Request], samplers: Sequence[RequestSampler]) -> bool:
        """Whether `tokens` chooses as these samplers would and notices the ends of these requests."""

    def logits(self, batch: DecodeBatch) -> Tensor:  # [B, V], valid until the next call
        """One step, for samplers of the caller's."""

    def tokens(self, batch: DecodeBatch, steps: int) -> Ints:  # [N, B], 1 <= N <= steps
        """The next tokens; -1: logits that are not finite. After a request's end they mean nothing."""


def slots_of(tables: Ints, requests: Ints, positions: Ints, kv_block_size: int) -> Ints:  # [B, M], [T], [T] -> [T]
    """Slot in the KV cache of each token, from its request's row of `tables` and its position."""
    found: Ints = tables[requests, positions // kv_block_size] * kv_block_size + positions % kv_block_size
    return found


class OpByOp:
    """The decoder's methods, a launch an op, on any device; the host looks at every token."""

    max_requests = sys.maxsize
    max_steps = 1

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache

    @staticmethod
    def refuses(decoder: Decoder) -> str | None:
        return None

    def takes(self, requests: Sequence[Request], samplers: Sequence[RequestSampler]) -> bool:
        return all(s.plain_greedy and s.params.logprobs is None for s in samplers)

    def logits(self, batch: DecodeBatch) -> Tensor:  # [B, V]
        ones = np.ones_like(batch.positions)
        logits = self.compute(batch.ids, batch.positions, ones, batch.tables, ones.astype(bool))
        assert logits is not None
        return logits

    def tokens(self, batch: DecodeBatch, steps: int) -> Ints:  # [1, B]
        found: Ints = ops.greedy(self.logits(batch)).cpu().numpy()
        return found[None]

    def compute(
        self,
        ids: Ints,  # [T], those of a request after one another
        starts: Ints,  # [B] position of each request's first token
        lengths: Ints,  # [B]
        tables: Ints,  # [B, M] kv_blocks
        samples: npt.NDArray[np.bool_],  # [B] whether the logits of its last token are wanted
    ) -> Tensor | None:  # [R, V]
        """Prompts and new tokens in one batch; logits of the requests that sample, None if there are none."""
        bounds = np.zeros(len(starts) + 1, dtype=np.int64)
        np.cumsum(lengths, out=bounds[1:])
        positions = np.arange(len(ids)) + np.repeat(starts - bounds[:-1], lengths)
        requests = np.repeat(np.arange(len(starts)), lengths)
        slots = slots_of(tables, requests, positions, self._cache.kv_block_size)
        wanted = bool(samples.any())
        select = bounds[1:][samples] - 1 if wanted else bounds[1:2] - 1  # at least one, for the final norm
        ends = starts + lengths
        parts = (ids, positions, slots, bounds, ends, select, tables.reshape(-1))
        ids_, positions_, slots_, bounds_, ends_, select_, tables_ = self._to_device(parts)
        paged = PagedContext(slots_, tables_.view(tables.shape), ends_, fresh=not starts.any())
        batch = Batch(positions_, bounds_, int(ends.max()) - 1, paged)
        hidden = self._decoder.hidden_states(ids_, batch, self._cache.pairs, select=select_)
        return self._decoder.logits(hidden) if wanted else None

    def _to_device(self, parts: Sequence[Ints]) -> list[Tensor]:
        """Each part as int64 on the device, in one copy."""
        whole = torch.from_numpy(np.concatenate(parts))
        if self._decoder.device.type == "cuda":
            whole = whole.pin_memory().to(self._decoder.device, non_blocking=True)
        elif self._decoder.device.type != "cpu":
            whole = whole.to(self._decoder.device)
        return list(whole.split([p.size for p in parts]))


class CpuStep:
    """`DecodeStep`, and greedy tokens without the host between them.

    A step too many costs as much as any: `tokens` ends with the first request that does, and after AHEAD_SECONDS.
    """

    max_steps = MAX_STEPS

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._step = DecodeStep(decoder, cache.pairs)
        self._kv_block_size = cache.kv_block_size
        self.max_requests = self._step.max_tokens

    @staticmethod
    def refuses(decoder: Decoder) -> str | None:
        return DecodeStep.refuses(decoder)

    def takes(self, requests: Sequence[Request], samplers: Sequence[RequestSampler]) -> bool:
        """Greedy requests whose ends do not hang on their text."""
        return len(requests) <= self.max_requests and all(
            s.plain_greedy and s.params.logprobs is None and not s.params.stop_strings for s in samplers
        )

    def logits(self, batch: DecodeBatch) -> Tensor:  # [B, V]
        ends = batch.positions + 1
        arrays = (batch.slots(self._kv_block_size), batch.tables, ends, batch.positions, np.arange(len(ends) + 1))
        slots, tables, contexts, positions, bounds = map(torch.from_numpy, arrays)
        paged = PagedContext(slots, tables, contexts, fresh=not batch.positions.any())
        inputs = Batch(positions, bounds, int(ends.max()) - 1, paged)
        return self._step.logits(torch.from_numpy(batch.ids), inputs)

    def tokens(self, batch: DecodeBatch, steps: int) -> Ints:  # [N, B]
        stops = np.full((len(batch.ids), max(map(len, batch.stop_ids))), -1, dtype=np.int64)
        for row, ends in zip(stops, batch.stop_ids, strict=True):
            row[: len(ends)] = ends
        arrays = (batch.ids, batch.positions, batch.tables, stops)
        ids, positions, tables, stop_ids = map(torch.from_numpy, arrays)
        found: Ints = self._step.greedy_tokens(ids, positions, tables, stop_ids, steps, AHEAD_SECONDS).numpy()
        return found
