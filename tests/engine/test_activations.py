"""Weights of 8 and 4 bits with activations that are not rounded: the model is the dequantised one, dense."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from accuracy import assert_as_accurate

from depthprune_runtime import Runtime, quantize
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.model.steps.cpu import DecodeStep
from depthprune_runtime.ops import quantized_linear, silu_mul
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

CPU = torch.device("cpu")
IDS = torch.tensor([3, 17, 9, 40, 2, 8, 8, 21])


@pytest.fixture(scope="module", params=[8, 4])
def quantised(request, pico_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / f"{request.param}.safetensors"
    quantize(pico_file, path, bits=request.param, method="rtn")
    return path


def dense(path, dtype: torch.dtype) -> Decoder:
    """The weights that the codes stand for, without an op that knows codes."""
    checkpoint = open_checkpoint(path)

    def weight(name: str):
        found = checkpoint.weight(name)
        return found.dense(torch.float64).to(dtype) if isinstance(found, QuantizedWeight) else found

    return Decoder(checkpoint.spec, weight, CPU, dtype)


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder.hidden_states(IDS, packed([len(IDS)], CPU)))


def test_logits_are_those_of_the_dequantised_model(quantised):
    """In float32, where a rounded activation shows: 8 bits are a hundredth, float32 a millionth."""
    truth = logits(dense(quantised, torch.float32))
    exact = logits(Runtime.load(quantised, "cpu", activations="fp32", dtype="fp32").decoder)
    rounded = logits(Runtime.load(quantised, "cpu", dtype="fp32").decoder)
    scale = truth.std()
    assert (exact - truth).abs().max() < 1e-4 * scale
    assert (rounded - truth).abs().max() > 1e-3 * scale


def test_decoding_is_that_of_the_dequantised_model(quantised):
    """Every decoded token, from the cache, has the log-probability of one forward pass of the dense model."""
    runtime = Runtime.load(quantised, "cpu", activations="fp32", dtype="fp32")
    assert runtime.decoder.rounds_inputs is False
    assert "rounds the inputs" in DecodeStep.refuses(runtime.decoder)
    prompt = IDS.tolist()
    (output,) = runtime.generate([prompt], max_new_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
    (completion,) = output.outputs
    ids = torch.tensor(prompt + list(completion.token_ids))
    model = dense(quantised, torch.float32)
    with torch.inference_mode():
        truth = model.logits(model.hidden_states(ids, packed([len(ids)], CPU))).log_softmax(-1)
    for i, (token, found) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        row = truth[len(prompt) - 1 + i]
        assert token == row.argmax()
        assert found[token].logprob == pytest.approx(float(row[token]), abs=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_the_op_is_as_accurate_as_the_dense_one(bits, gated, tokens, monkeypatch):
    """Over several strips, the last of them short; an outlier among the inputs, which 8 bits would not survive."""
    home = importlib.import_module("depthprune_runtime.ops.quantized_linear")
    monkeypatch.setattr(home, "STRIP", 3 * 16 * 70)
    generator = torch.Generator().manual_seed(bits)
    spec, rows, columns = QuantSpec(bits, 32, symmetric=bits == 8), 202, 70
    codes = torch.randint(0, spec.levels, (rows, columns), generator=generator)
    scales = torch.rand(rows, 3, generator=generator).bfloat16() * 0.01
    zeros = None if spec.symmetric else torch.randint(0, spec.levels, (rows, 3), generator=generator)
    weight = QuantizedWeight.from_codes(spec, codes, scales, zeros)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, 7] *= 1000
    x, bias = x.bfloat16(), torch.randn(rows, generator=generator).bfloat16()
    truth = torch.nn.functional.linear(x.double(), weight.dense().double(), bias.double())
    same = torch.nn.functional.linear(x, weight.dense().bfloat16(), bias)
    if gated:
        gate, up = truth.chunk(2, -1)
        truth, same = torch.nn.functional.silu(gate) * up, silu_mul(same)
    out = quantized_linear(x, dataclasses.replace(weight, rounds_inputs=False), bias, gated)
    assert out.dtype == torch.bfloat16
    assert_as_accurate(out, same, truth)


def test_activations_that_are_not_the_models_are_refused(quantised):
    with pytest.raises(InputError, match=r"activations: expected auto, int8 or fp32 .*, got 'bf16'"):
        Runtime.load(quantised, "cpu", dtype="fp32", activations="bf16")
    with pytest.raises(InputError, match="activations: expected auto, int8 or bf16"):
        Runtime.load(quantised, "cpu", dtype="bf16", activations="int4")


def test_a_dense_model_takes_both(pico_file):
    for activations in ("auto", "int8", "fp32"):
        decoder = Runtime.load(pico_file, "cpu", dtype="fp32", activations=activations).decoder
        assert decoder.rounds_inputs
