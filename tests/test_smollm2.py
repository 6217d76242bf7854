"""The real model: SmolLM2-135M-Instruct against Transformers, from import to pruned file."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from depthprune_runtime import Runtime, ShortGPTOptions, perplexity, prune
from depthprune_runtime.texts import load_text

PROMPT = "Gravity is the force that"
pytestmark = pytest.mark.usefixtures("all_threads")


@pytest.fixture(scope="module")
def oracle(smollm2_gguf):
    """Transformers' own dequantised model and tokenizer, fp32."""
    options = {"gguf_file": smollm2_gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **options
    )
    return model.eval(), AutoTokenizer.from_pretrained(smollm2_gguf.parent, **options)


@pytest.fixture(scope="module")
def exact(smollm2_gguf):
    return Runtime.load(smollm2_gguf, device="cpu", dtype="float32")


def test_fp32_logits_equal_transformers(oracle, exact):
    model, tokenizer = oracle
    ids = tokenizer(load_text("builtin-test")[:1500])["input_ids"][:256]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
    ours = exact.logits(ids)
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


def test_64_greedy_tokens_equal_transformers_generate(oracle, exact):
    model, tokenizer = oracle
    ids = tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    ours = exact.generate(PROMPT, temperature=0, max_new_tokens=64)[0].outputs[0]
    assert list(ours.token_ids) == theirs
    assert len(theirs) == 64


def test_batched_unequal_prompts_equal_one_by_one(exact):
    prompts = [PROMPT, "The capital of France is", "1, 2, 3,", "Water " * 40]
    together = exact.generate(prompts, temperature=0, max_new_tokens=16)
    alone = [exact.generate(p, temperature=0, max_new_tokens=16)[0] for p in prompts]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


def test_the_tokenizer_is_the_models_own(oracle, exact):
    _, tokenizer = oracle
    for text in (PROMPT, "naïve 東京 🙂\n\n  def f(x):\treturn x", "<|im_start|>user\nhi<|im_end|>"):
        assert exact.tokenizer.encode(text) == tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    out = exact.chat(messages, temperature=0, max_new_tokens=24)
    assert out.prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "4" in out.text
    assert out.outputs[0].finish_reason == "stop"


@pytest.mark.timeout(1800)  # prunes and scores a real model: minutes beside other work
def test_pruned_for_real(smollm2_file, tmp_path):
    """Three of 30 blocks: perplexity rises but not beyond use; the score and the repair are worth something."""
    text = load_text("builtin-test")

    def measured(path):
        return perplexity(Runtime.load(path), text, seq_len=512, windows=6).perplexity

    def pruned(**options):
        result = prune(
            smollm2_file, tmp_path / "p.safetensors", blocks=3, samples=32, seq_len=256, overwrite=True, **options
        )
        assert len(result.spec.sublayers) == 54
        return measured(result.path)

    dense, as_printed = measured(smollm2_file), pruned(repair="none")
    assert dense < as_printed < 2.5 * dense
    assert as_printed < pruned(repair="none", options=ShortGPTOptions("reverse"))
    assert pruned(repair="ridge") < as_printed
