"""Small Llama-shaped models on the GPU: the logits keep the tolerance rule, and the engine says what they say."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from gpu_models import CPU, CUDA, SPECS, decoder, needs_gpu
from torch import Tensor

from depthprune_runtime.engine.engine import Engine
from depthprune_runtime.engine.inputs import Inputs
from depthprune_runtime.engine.options import EngineOptions
from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder

PROMPTS = [list(range(3, 8)), [7] * 90 + [11, 13], [500, 1, 2], list(range(40, 73))]


@torch.inference_mode()
def teacher_forced(model: Decoder, sequences: list[list[int]]) -> Tensor:
    """Logits after every token of every sequence, computed as one packed batch."""
    ids = torch.tensor([t for s in sequences for t in s], device=model.device)
    batch = packed([len(s) for s in sequences], model.device)
    return model.logits(model.hidden_states(ids, batch)).to(CPU)


def generate(model: Decoder, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    inputs = Inputs("random", model.spec, None, {})
    engine = Engine(model, inputs, EngineOptions(kv_memory="64MiB", max_num_seqs=8, max_num_batched_tokens=128))
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    order = [engine.add_request(prompt, params) for prompt in prompts]
    done = {}
    while engine.has_unfinished():
        for delta in engine.step():
            assert delta.error is None, delta.error
            if delta.result is not None:
                done[delta.request_id] = list(delta.result.outputs[0].token_ids)
    return [done[request] for request in order]


def verify_generation(model: Decoder, truth: Decoder, tokens: int) -> None:
    """Every generated token is the most likely one by the model's own logits, up to what rounding can turn.

    The kernels of decode and of prefill sum in different orders: where two logits differ by less than their errors,
    either may win.
    """
    made = generate(model, PROMPTS, tokens)
    whole = [prompt + answer for prompt, answer in zip(PROMPTS, made, strict=True)]
    logits, true = teacher_forced(model, whole).float(), teacher_forced(truth, whole)
    allowed = 2 * float((logits - true).abs().max()) + 1e-4
    assert allowed < 0.1 * float(true.abs().max()), f"logits are off by {allowed / 2}"
    start = 0
    for prompt, answer in zip(PROMPTS, made, strict=True):
        assert len(answer) == tokens
        rows = logits[start + len(prompt) - 1 : start + len(prompt) + tokens - 1]
        behind = rows.max(-1).values - rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert float(behind.max()) <= allowed, f"token {int(behind.argmax())} is behind the best by {behind.max()}"
        start += len(prompt) + tokens


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", list(SPECS))
def test_logits(name: str, dtype: torch.dtype) -> None:
    models = [decoder(SPECS[name], *place, dtype) for place in ((CUDA, dtype), (CPU, dtype), (CPU, torch.float32))]
    actual, baseline, truth = [teacher_forced(model, PROMPTS) for model in models]
    assert_as_accurate(actual, baseline, truth, "logits")
    assert torch.equal(actual, teacher_forced(models[0], PROMPTS)), "logits differ from run to run"


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", list(SPECS))
def test_generation(name: str, dtype: torch.dtype) -> None:
    model, truth = [decoder(SPECS[name], *place, dtype) for place in ((CUDA, dtype), (CPU, torch.float32))]
    verify_generation(model, truth, tokens=24)


@pytest.mark.parametrize("name", list(SPECS))
def test_the_check_itself_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, truth = [decoder(SPECS[name], CPU, dtype, torch.bfloat16) for dtype in (torch.bfloat16, torch.float32)]
    verify_generation(model, truth, tokens=6)
    other = generate(model, PROMPTS, 6)
    other[1][3] = (other[1][3] + 1) % 512
    monkeypatch.setattr(f"{__name__}.generate", lambda *_: other)
    with pytest.raises(AssertionError, match="token 3 is behind"):
        verify_generation(model, truth, tokens=6)
