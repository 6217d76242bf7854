"""Worker of bench_cpu.py: llama.cpp through its C API, sequences in one batch, greedy.

python run_llama_cpp.py quantize FROM.gguf TO.gguf q8_0     # makes the smaller files instead
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np
from worker import Stopwatch, serve

_BATCH_CONTEXT = 256  # positions of each sequence where several are decoded together
_UBATCH = 512
_FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


class LlamaCpp:
    def __init__(self, path: str, threads: int, context: int, batch: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._threads, self._batch_size = threads, batch
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._single = self._context(context, 1)
        self._several: Any = None  # made when first needed, so that memory at batch 1 does not count it
        self.settings = f"{threads} threads, n_batch {_UBATCH}, mmap, flash attention auto"

    def _context(self, positions: int, sequences: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = positions * sequences, sequences
        params.n_batch = params.n_ubatch = _UBATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        return context

    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        context = self._single
        if len(prompts) > 1:
            self._several = self._several or self._context(_BATCH_CONTEXT, self._batch_size)
            context = self._several
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(_UBATCH, 0, 1)
        try:
            return self._generate(context, batch, prompts, tokens)
        finally:
            llama_cpp.llama_batch_free(batch)

    def _generate(self, context: Any, batch: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        watch = Stopwatch(len(prompts), tokens)
        flat = [(s, p, t, p == len(ids) - 1) for s, ids in enumerate(prompts) for p, t in enumerate(ids)]
        for first in range(0, len(flat), _UBATCH):
            watch.add(self._decode(context, batch, flat[first : first + _UBATCH]))
        position = len(prompts[0])
        while watch.unfinished:
            step = [(s, position, ids[-1], True) for s, ids in enumerate(watch.tokens)]
            watch.add(self._decode(context, batch, step))
            position += 1
        return watch.result()

    def _decode(self, context: Any, batch: Any, items: list[tuple[int, int, int, bool]]) -> list[tuple[int, list[int]]]:
        """One batch of (sequence, position, token, whether its next token is wanted)."""
        batch.n_tokens = len(items)
        for i, (sequence, position, token, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        new = []
        for i, (sequence, _, _, wanted) in enumerate(items):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(context, i)
                new.append((sequence, [int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())]))
        if not new:
            llama_cpp.llama_synchronize(context)
        return new


def quantize(source: str, target: str, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[kind]
    params.nthread = 2
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status:
        sys.exit(f"llama_model_quantize: status {status}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["quantize"]:
        quantize(*sys.argv[2:])
    else:
        serve(LlamaCpp, llama_cpp.__version__)
