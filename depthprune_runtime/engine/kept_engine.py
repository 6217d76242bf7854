"""`KeptEngine`: the engine behind `Runtime.generate`, `chat` and `stream`, kept from one call to the next."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch

from depthprune_runtime.engine.engine import Engine
from depthprune_runtime.engine.inputs import Inputs, RequestGroup
from depthprune_runtime.engine.kv_cache import kv_blocks_needed
from depthprune_runtime.engine.memory import default_kv_memory, free_memory, kv_block_bytes
from depthprune_runtime.engine.options import KV_BLOCK_SIZE, EngineOptions
from depthprune_runtime.engine.outputs import OutputDelta
from depthprune_runtime.model.decoder import Decoder

_MAX_RUNNING = 64  # outputs decoded together
_PREFILL_TOKENS = 4096  # tokens in one forward pass


class KeptEngine:
    """Lends one engine to one call at a time.

    The first call makes the engine, with as much KV cache as that call can use. A call that can use more than it has
    closes it and makes a larger one. So the cache never exceeds what the largest call could use.

    A call that finds the engine lent makes one of its own, and closes it at its end. The other call may be that of
    another thread, or a stream of this thread that is not at its end. So no call waits for another, and none can wait
    for itself.

    Args:
        decoder: the model's layers.
        inputs: as for `Engine`.
        keep_prefixes: let a call find the keys and values of earlier calls. Otherwise each call begins with an empty
            cache, and its outputs do not depend on what ran before.
    """

    def __init__(self, decoder: Decoder, inputs: Inputs, keep_prefixes: bool) -> None:
        self._decoder = decoder
        self._inputs = inputs
        self._keep_prefixes = keep_prefixes
        self._engine: Engine | None = None
        self._lent = threading.Lock()  # held while a call has the engine; any thread may give it back
        self._closing = False

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache that is kept; 0 where none is."""
        engine = self._engine
        return 0 if engine is None else engine.kv_cache_bytes

    def run(self, groups: Sequence[RequestGroup]) -> Iterator[OutputDelta]:
        """Deltas of all groups until they end. Closed early, it drops them."""
        with self._borrowed(groups) as engine:
            for group in groups:
                engine.add(group)
            while engine.has_unfinished():
                yield from engine.step()

    def close(self) -> None:
        """Free the KV cache: now, or at the end of the call that uses it. A later call makes a new one."""
        self._closing = True  # first, for whoever gives the engine back looks at it last
        if self._lent.acquire(blocking=False):
            try:
                self._closing = False
                self._drop()
            finally:
                self._lent.release()

    @contextlib.contextmanager
    def _borrowed(self, groups: Sequence[RequestGroup]) -> Iterator[Engine]:
        wanted = self._kv_bytes(groups)
        if not self._lent.acquire(blocking=False):
            engine = self._made(wanted)
            try:
                yield engine
            finally:
                engine.close()
            return
        try:
            engine = self._large_enough(wanted)
            try:
                yield engine
            finally:
                if engine.closed:  # a step failed
                    self._engine = None
                else:
                    engine.abort_all()
        finally:
            self._lent.release()
            if self._closing:
                self.close()

    def _large_enough(self, wanted: int) -> Engine:
        if self._engine is not None and self._engine.kv_cache_bytes < wanted:
            self._drop()
        if self._engine is None:
            self._engine = self._made(wanted)
        elif not self._keep_prefixes:
            self._engine.clear_prefix_cache()
        return self._engine

    def _drop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
            if self._decoder.device.type == "cuda":
                torch.cuda.empty_cache()  # what torch's allocator holds, `free_memory` does not count

    def _made(self, wanted: int) -> Engine:
        """An engine with `wanted` bytes of KV cache, or the default share of the free memory if that is less."""
        free = free_memory(self._decoder.device)
        memory = wanted if free is None else min(wanted, int(default_kv_memory(self._decoder.device) * free))
        options = EngineOptions(
            kv_memory=memory,
            max_num_seqs=_MAX_RUNNING,
            max_num_batched_tokens=max(_PREFILL_TOKENS, _MAX_RUNNING),
            max_waiting=None,
        )
        return Engine(self._decoder, self._inputs, options)

    def _kv_bytes(self, groups: Sequence[RequestGroup]) -> int:
        """Bytes that the largest outputs running together need, one kv_block each to spare."""
        needs = sorted(kv_blocks_needed(r.max_cached_tokens, KV_BLOCK_SIZE) + 1 for g in groups for r in g.requests)
        return sum(needs[-_MAX_RUNNING:]) * kv_block_bytes(self._decoder.spec, KV_BLOCK_SIZE, self._decoder.dtype)
