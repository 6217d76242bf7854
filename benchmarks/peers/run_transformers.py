"""Worker of bench_cpu.py: Transformers, not compiled, a plain loop of forward passes over its KV cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from worker import Stopwatch, serve


class Transformers:
    def __init__(self, path: str, threads: int, context: int, batch: int) -> None:
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.settings = f"{threads} threads, {self._model.config._attn_implementation} attention, not compiled"

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        watch = Stopwatch(len(prompts), tokens)
        ids, cache = torch.tensor(prompts), None
        while watch.unfinished:
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            watch.add(list(enumerate(ids.tolist())))
        return watch.result()


if __name__ == "__main__":
    serve(Transformers, transformers.__version__)
