"""Logit processing against Transformers' processors, and the distribution that is drawn from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_decoder import sampler_of
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from depthprune_runtime import SamplingParams
from depthprune_runtime.engine.adjustments import penalize_repetition
from depthprune_runtime.engine.sampler import (
    NOT_FINITE,
    filter_logits,
    sample_batch,
    top_logprobs,
)


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
    mask = torch.zeros(1, size, dtype=torch.bool).index_fill(1, seen, True)
    penalized = penalize_repetition(logits[None], mask, torch.tensor([[penalty]]))
    others = [SamplingParams(temperature=0.5, top_k=3), SamplingParams(temperature=2.0, top_p=0.5, min_p=0.1)]
    batch = torch.cat((torch.randn(1, size, generator=generator), penalized, torch.zeros(1, size)))
    ours = filter_logits(batch, [others[0], params, others[1]])[1]
    torch.testing.assert_close(ours, filter_logits(penalized, [params])[0], rtol=0, atol=0)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        processors.append(MinPLogitsWarper(min_p))
    theirs = processors(seen[None], logits[None].clone())[0]
    torch.testing.assert_close(ours, theirs - theirs.max())  # up to a constant


@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.99, 0.995])
def test_top_p_of_a_large_vocabulary_equals_transformers(top_p, spread):
    """Peaked rows are settled among the most likely tokens, flat ones are not."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(5)) * spread
    ours = filter_logits(logits, [SamplingParams(top_p=top_p)] * 3)
    theirs = TopPLogitsWarper(top_p)(None, logits)
    torch.testing.assert_close(ours, theirs - theirs.amax(-1, keepdim=True))  # up to a constant


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    params = SamplingParams(temperature=0.7, top_k=4, seed=3)
    expected = filter_logits(logits[None], [params])[0].softmax(-1)
    sampler = sampler_of(params, (), 0, 5)
    count = 4000
    tokens = [sample_batch(logits[None], [sampler])[0] for _ in range(count)]
    drawn = torch.bincount(torch.tensor(tokens), minlength=5) / count
    assert float(drawn[3]) == 0  # not among the top four
    assert (drawn - expected).abs().max() < 4 * (0.25 / count) ** 0.5  # four standard errors at most


def test_the_penalty_sees_prompt_and_output():
    logits = torch.tensor([[3.0, 2.9, 2.8, 2.7]])
    params = SamplingParams(temperature=0, repetition_penalty=1.5)
    sampler = sampler_of(params, (0,), 0, 4)
    assert [sample_batch(logits, [sampler])[0] for _ in range(3)] == [1, 2, 3]


def test_a_draw_depends_on_its_own_request_only():
    """The same token whatever the company, in a mixed batch of greedy, penalised and sampled rows."""
    size = 50
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(0)) * 3
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, seed=2, top_k=9, top_p=0.8),
        SamplingParams(temperature=0, repetition_penalty=1.8),
        SamplingParams(temperature=1.3, seed=3, min_p=0.05, repetition_penalty=0.8),
        SamplingParams(temperature=0.2, seed=4),
    ]

    def fresh(i):
        return sampler_of(kinds[i], (1, 2, 3), 0, size)

    together = [fresh(i) for i in range(6)]
    alone = [fresh(i) for i in range(6)]
    for _ in range(5):
        batch = sample_batch(logits, together)
        assert batch == [sample_batch(logits[i : i + 1], [alone[i]])[0] for i in range(6)]
    assert batch[0] == int(logits[0].argmax())


def test_seeds_and_outputs_have_streams_of_their_own():
    def draws(seed, stream):
        sampler = sampler_of(SamplingParams(seed=seed), (), stream, 5)
        return tuple(sampler.draw() for _ in range(3))

    keys = [(seed, stream) for seed in (0, 1, 2, 2**32, 2**63) for stream in range(3)]
    assert len({draws(*k) for k in keys}) == len(keys)
    assert draws(7, 1) == draws(7, 1)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_damaged_row_is_told_and_alone(damage):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    logits[1, 4] = damage
    for params in (SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(seed=1, top_p=0.5, top_k=5)):
        samplers = [sampler_of(params, (), i, 20) for i in range(3)]
        tokens = sample_batch(logits, samplers)
        assert tokens[1] == NOT_FINITE
        assert min(tokens[0], tokens[2]) >= 0


def test_top_logprobs_of_a_batch_equal_those_of_its_rows():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(2))
    tokens, counts = [4, int(logits[1].argmax()), 9], [0, 2, 5]
    for row, found, token, count in zip(logits, top_logprobs(logits, tokens, counts), tokens, counts, strict=True):
        expected = row.log_softmax(-1)
        order = expected.argsort(descending=True).tolist()
        ids = [t for t, _, _ in found]
        assert ids[:count] == order[:count]
        assert set(ids) == {*order[:count], token}
        for t, value, rank in found:
            assert value == pytest.approx(float(expected[t]), abs=1e-6)
            assert rank == order.index(t) + 1


@pytest.mark.parametrize("name", ["n", "top_k", "max_tokens", "logprobs", "seed"])
@pytest.mark.parametrize("value", [-2, 1.5, "3", True])
def test_whole_numbers_are_required(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


class Fixed:
    """A random source that always says the same."""

    def __init__(self, bits):
        self.bits = bits

    def getrandbits(self, count):
        return self.bits if self.bits >= 0 else (1 << count) + self.bits


@pytest.mark.parametrize(("bits", "expected"), [(0, 2), (-1, 4)])
@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn(bits, expected, options):
    """u = 0 gives the first token that was not removed, not token 0; the largest u gives the last."""
    logits = torch.tensor([[-9.0, -9.0, 1.0, 1.1, 0.9, -9.0]])
    sampler = sampler_of(SamplingParams(seed=1, **options), (), 0, 6)
    sampler._random = Fixed(bits)
    assert sample_batch(logits, [sampler]) == [expected]
    plain = sampler_of(SamplingParams(seed=1), (), 0, 6)
    plain._random = Fixed(bits)
    removed = logits.masked_fill(logits < 0, -float("inf"))
    assert sample_batch(removed, [plain]) == [expected]


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 9.9e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("largest", [1.0, 6e4, 1e30])
def test_a_low_temperature_gives_the_most_likely_token(temperature, largest):
    logits = torch.tensor([[0.0, largest, 0.5 * largest, -largest]])
    sampler = sampler_of(SamplingParams(temperature=temperature, seed=1), (), 0, 4)
    assert sample_batch(logits, [sampler]) == [1]


def test_temperatures_below_a_limit_are_greedy():
    assert SamplingParams(temperature=9.9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_ends_of_the_penalty_give_finite_logits(penalty):
    """Of bfloat16's large logits, too: dividing or multiplying them stays in float32."""
    logits = torch.tensor([[3e38 / 101, -3e38 / 101, 1.0]])
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=1, repetition_penalty=penalty)
        assert sample_batch(logits, [sampler_of(params, (0, 1), 0, 3)])[0] in (0, 1, 2)
