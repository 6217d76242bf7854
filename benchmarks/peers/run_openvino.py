"""Worker of bench_cpu.py: OpenVINO GenAI, its continuous batching pipeline (paged attention), greedy.

python run_openvino.py export HUGGING_FACE_FOLDER TO bf16|int8|int4     # converts a model instead
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import Stopwatch, serve

_CACHE_GB = 1


class OpenVino:
    def __init__(self, path: str, threads: int, context: int, batch: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.max_num_seqs = batch
        scheduler.max_num_batched_tokens = max(context, 512)
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)
        self._requests = 0
        self.settings = f"{threads} threads, latency hint, default precisions of the KV cache and arithmetic"

    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        watch = Stopwatch(len(prompts), tokens)
        handles = []
        for prompt in prompts:
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._requests, ids, config))
            self._requests += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            watch.add([(i, _new(handle)) for i, handle in enumerate(handles)])
        return watch.result()


def _new(handle: Any) -> list[int]:
    ids: list[int] = []
    while handle.can_read():
        for output in handle.read().values():
            ids += output.generated_ids
    return ids


def export(source: str, target: str, precision: str) -> None:
    import torch
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    options: dict[str, Any] = {
        "bf16": {"load_in_8bit": False, "dtype": torch.bfloat16},
        "int8": {"quantization_config": OVWeightQuantizationConfig(bits=8)},
        "int4": {"quantization_config": OVWeightQuantizationConfig(bits=4, sym=True, group_size=64, ratio=1.0)},
    }
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **options[precision])
    model.save_pretrained(target)


if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        export(*sys.argv[2:])
    else:
        serve(OpenVino, genai.__version__)
