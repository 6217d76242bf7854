"""What parameters change in the logits, against Transformers' processors and the formulas of OpenAI's API."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from engine_runs import GREEDY, SPECS, run
from random_decoder import engine, sampler_of, solo
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from depthprune_runtime import InputError, SamplingParams
from depthprune_runtime.engine.adjustments import adjusted
from depthprune_runtime.engine.sampler import NONE_LEFT, sample_batch

V = 40
PROMPT = (3, 4, 5)
OUTPUT = (7, 8, 7, 9, 7)
INF = float("inf")


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 4


def behind(output, end_ids=(), words=(), **options):
    """The adjustment of a request that has written `output`."""
    sampler = sampler_of(SamplingParams(max_tokens=99, **options), PROMPT, 0, V, end_ids, words)
    for token in output:
        sampler.take(token)
    return sampler.adjustment


def ids(*tokens) -> torch.Tensor:
    return torch.tensor([tokens], dtype=torch.int64)


@pytest.mark.parametrize("count", [0, 4, 5, 6])
def test_min_tokens_equals_transformers(count):
    output, ends = OUTPUT[:1] * count, [1, 2]
    theirs = MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, ends)(ids(*PROMPT, *output), logits().clone())
    assert torch.equal(adjusted(logits(), [behind(output, ends, min_tokens=5)]), theirs)
    assert torch.isinf(theirs).any() == (count < 5)


@pytest.mark.parametrize("output", [(), (7,), (7, 8), (8, 7), (7, 8, 9), (6, 7, 8, 9)])
def test_bad_words_equal_transformers(output):
    words = [[5], [7, 8], [7, 8, 9], [7, 8, 9, 10], [8, 8]]
    found = adjusted(logits(), [behind(output, (), words, bad_words=("x",))])
    theirs = NoBadWordsLogitsProcessor(words, eos_token_id=[])(ids(*output) if output else ids(0), logits().clone())
    assert torch.equal(found, theirs)
    assert found[0, 5] == -INF


def test_repetition_and_bias_equal_transformers():
    theirs = SequenceBiasLogitsProcessor([[[9], 2.5], [[11], -100.0]])(ids(*PROMPT, *OUTPUT), logits().clone())
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(ids(*PROMPT, *OUTPUT), theirs)
    ours = adjusted(logits(), [behind(OUTPUT, repetition_penalty=1.4, logit_bias={9: 2.5, "11": -100})])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_penalties_of_the_output_follow_openai():
    """mu_j - c_j * frequency - [c_j > 0] * presence, over the output alone."""
    ours = adjusted(logits(), [behind(OUTPUT, frequency_penalty=0.5, presence_penalty=-0.25)])[0]
    for token in range(V):
        times = OUTPUT.count(token)
        expected = float(logits()[0, token]) - 0.5 * times + (0.25 if times else 0.0)
        assert float(ours[token]) == pytest.approx(expected, abs=1e-6)


def test_only_allowed_tokens_come():
    ours = adjusted(logits(), [behind((), allowed_token_ids=[4, 9, 4])])[0]
    assert [t for t in range(V) if ours[t] > -INF] == [4, 9]
    assert torch.equal(ours[[4, 9]], logits()[0, [4, 9]])


def test_the_order_of_all_of_them():
    """A bias comes before the penalty that divides it; what was removed stays removed."""
    options = {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "logit_bias": {7: 10.0, 1: 100.0}, "min_tokens": 50}
    row = torch.zeros(1, V)
    ours = adjusted(row, [behind(OUTPUT, [1], **options)])[0]
    assert float(ours[7]) == (0.0 + 10.0) / 2.0 - 3.0
    assert float(ours[8]) == -1.0
    assert float(ours[1]) == -INF


def test_each_row_is_its_own():
    kinds = [
        {"logit_bias": {3: 5.0}},
        {},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0},
        {"allowed_token_ids": [1, 2, 7], "min_tokens": 9},
    ]
    made = [behind(OUTPUT, [1], **options) for options in kinds]
    assert made[1] is None
    rows = logits(5)
    together = adjusted(rows, made)
    for i, one in enumerate(made):
        torch.testing.assert_close(together[i : i + 1], adjusted(rows[i : i + 1], [one]), rtol=0, atol=0)
    assert torch.equal(together[1], rows[1])
    assert torch.equal(rows, logits(5)), "the batch's logits belong to others"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_removes_all_tokens_says_so_alone(temperature):
    params = SamplingParams(temperature=temperature, seed=1, allowed_token_ids=[1], min_tokens=2)
    others = [SamplingParams(temperature=0), SamplingParams(seed=3)]
    samplers = [sampler_of(p, PROMPT, 0, V, [1]) for p in (params, *others)]
    tokens = sample_batch(logits(3), samplers)
    assert tokens[0] == NONE_LEFT
    assert tokens[1] == int(logits(3)[1].argmax())
    e = engine(SPECS["plain"], 60)
    e.add_request((1, 2), dataclasses.replace(params, stop_token_ids=(1,)), "bad")
    e.add_request((1, 2), GREEDY, "good")
    results = run(e)
    assert results["bad"][1].outputs[0].error.startswith("no token is left")
    assert results["good"][1].outputs[0].token_ids == solo(SPECS["plain"], (1, 2), GREEDY)


def test_the_engine_applies_them_through_preemption_and_batches():
    plain = solo(SPECS["plain"], (1, 2), GREEDY)
    kinds = [
        {"min_tokens": 6, "stop_token_ids": (plain[0], plain[2])},
        {"logit_bias": {plain[0]: -100}},
        {"allowed_token_ids": (5, 6, 7)},
        {"frequency_penalty": 2.0, "presence_penalty": 2.0},
    ]
    e = engine(SPECS["plain"], 10)  # so few pages that requests are preempted
    for i, options in enumerate(kinds):
        e.add_request((1, 2), dataclasses.replace(GREEDY, **options), str(i))
    results = run(e)
    tokens = [results[str(i)][1].outputs[0].token_ids for i in range(4)]
    assert len(tokens[0]) >= 6
    assert not set(tokens[0][:5]) & {plain[0], plain[2]}
    assert plain[0] not in tokens[1]
    assert set(tokens[2]) <= {5, 6, 7}
    assert tokens[3] == solo(SPECS["plain"], (1, 2), dataclasses.replace(GREEDY, **kinds[3]))


def test_bad_words_of_text(pico_runtime):
    plain = pico_runtime.generate("the quick", GREEDY)[0].outputs[0]
    word = pico_runtime.tokenizer.decode(plain.token_ids[:1], skip_special_tokens=False)
    bad = pico_runtime.tokenizer.encode(word.lstrip(), add_special_tokens=False)
    found = pico_runtime.generate("the quick", GREEDY, bad_words=[word])[0].outputs[0].token_ids
    assert not any(found[i : i + len(bad)] == tuple(bad) for i in range(len(found)))


def test_min_tokens_lets_no_stop_string_end_it_before(pico_runtime):
    text = pico_runtime.generate("the quick", GREEDY)[0].text
    stop = text[:1]
    assert pico_runtime.generate("the quick", GREEDY, stop=stop)[0].text == ""
    output = pico_runtime.generate("the quick", GREEDY, stop=stop, min_tokens=4)[0].outputs[0]
    assert len(output.token_ids) >= 4


def test_no_limit_of_tokens_is_the_context_or_the_cache(pico_runtime):
    params = dataclasses.replace(GREEDY, max_tokens=None)
    context = pico_runtime.spec.max_position_embeddings
    assert len(pico_runtime.generate([5, 6], params)[0].outputs[0].token_ids) == context - 2
    e = engine(SPECS["plain"], 5)  # 20 tokens; the last one needs no place
    request_id = e.add_request((1, 2), params)
    assert len(run(e)[request_id][1].outputs[0].token_ids) == 19


def test_all_logprobs_and_no_text(pico_runtime):
    output = pico_runtime.generate([5, 6], GREEDY, logprobs=-1, detokenize=False, max_tokens=2)[0].outputs[0]
    assert [len(row) for row in output.logprobs] == [pico_runtime.spec.vocab_size] * 2
    assert output.text == ""
    assert {p.decoded_token for p in output.logprobs[0].values()} == {None}
    total = sum(2.718281828459045**p.logprob for p in output.logprobs[0].values())
    assert total == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(InputError, match=r"logprobs: expected at most 20 \(max_logprobs\), got 384"):
        pico_runtime.engine(kv_memory="1MiB").prepare([5], SamplingParams(logprobs=-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allowed_token_ids": [384]}, "allowed_token_ids: expected token ids below 384"),
        ({"logit_bias": {384: 1}}, "logit_bias: expected token ids below 384"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias: expected an integer >= 0"),
        ({"stop": "a", "detokenize": False}, "stop: expected none without detokenize"),
    ],
)
def test_what_the_model_does_not_have_is_refused_in_one_line(pico_runtime, options, message):
    with pytest.raises(InputError, match=message) as caught:
        pico_runtime.generate([5], **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_spaces_between_special_tokens(pico_runtime):
    """As vLLM does: behind a special token another one is its bare text."""
    tokenizer = pico_runtime.tokenizer
    stream = tokenizer.stream(False, (), False)
    assert "".join(map(stream.push, [2, 3, 2])) == "<|user|><|assistant|><|user|>"
