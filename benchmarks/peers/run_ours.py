"""Worker of bench_cpu.py: our runtime."""

from __future__ import annotations

from typing import Any

import torch
from worker import Stopwatch, serve

from depthprune_runtime import Runtime, SamplingParams, __version__


class Ours:
    def __init__(self, path: str, threads: int, context: int, batch: int) -> None:
        torch.set_num_threads(threads)
        runtime = Runtime.load(path, skip_tokenizer_init=True)
        tokens = max(context, batch * 256) + 256
        self._engine = runtime.engine(
            kv_memory=tokens * runtime.spec.kv_bytes_per_token(runtime.dtype.itemsize),
            max_num_seqs=batch,
            enable_prefix_caching=False,
        )
        self.settings = f"{threads} threads, prefix caching off, no tokenizer"

    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        watch = Stopwatch(len(prompts), tokens)
        for i, prompt in enumerate(prompts):
            self._engine.add_request(prompt, params, request_id=str(i))
        while self._engine.has_unfinished():
            watch.add([(int(d.request_id), list(d.token_ids)) for d in self._engine.step()])
        return watch.result()


if __name__ == "__main__":
    serve(Ours, __version__)
