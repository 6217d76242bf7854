"""Logit processing against Transformers' processors, and the distribution that is drawn from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from depthprune_runtime import SamplingParams
from depthprune_runtime.engine.sampler import RequestSampler, filter_logits, penalize_repetition


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 60),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(-1, 70),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 0.9),
    penalty=st.floats(0.5, 2.0),
)
def test_processing_equals_transformers(seed, size, temperature, top_k, top_p, min_p, penalty):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator) * 4
    seen = torch.randint(0, size, (5,), generator=generator).unique()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = filter_logits(penalize_repetition(logits, seen, penalty), params)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        processors.append(MinPLogitsWarper(min_p))
    theirs = processors(seen[None], logits[None].clone())[0]
    torch.testing.assert_close(ours, theirs)


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    params = SamplingParams(temperature=0.7, top_k=4, seed=3)
    expected = filter_logits(logits, params).softmax(-1)
    sampler = RequestSampler(params, (), 0, torch.device("cpu"))
    count = 4000
    drawn = torch.bincount(torch.tensor([sampler.sample(logits) for _ in range(count)]), minlength=5) / count
    assert float(drawn[3]) == 0  # not among the top four
    assert (drawn - expected).abs().max() < 4 * (0.25 / count) ** 0.5  # four standard errors at most


def test_the_penalty_sees_prompt_and_output():
    logits = torch.tensor([3.0, 2.9, 2.8, 2.7])
    params = SamplingParams(temperature=0, repetition_penalty=1.5)
    sampler = RequestSampler(params, (0,), 0, torch.device("cpu"))
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["n", "top_k", "max_tokens", "logprobs", "seed"])
@pytest.mark.parametrize("value", [-2, 1.5, "3", True])
def test_whole_numbers_are_required(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})
