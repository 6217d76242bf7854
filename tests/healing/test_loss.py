"""Distillation on the kept logits, against torch's own divergence over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from depthprune_runtime.healing.loss import kept_divergence, kept_logprobs, next_token_loss, relative_distance

TOKENS, WIDTH, VOCABULARY = 150, 16, 40  # more tokens than rows at a time


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.5
    teacher = torch.randn(TOKENS, VOCABULARY, generator=generator) * 2
    return hidden.requires_grad_(), head, teacher


def grouped(logprobs, ids):
    """[T, k + 1]: the kept tokens and the sum of the others."""
    rest = torch.ones_like(logprobs).scatter_(1, ids, 0.0)
    return torch.cat((logprobs.gather(1, ids), (logprobs.exp() * rest).sum(-1, keepdim=True).log()), -1)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1])
def test_loss_and_gradient_are_those_of_the_grouped_distributions(case, k):
    hidden, head, teacher = case
    ids, logprobs = kept_logprobs(teacher, k)
    loss = kept_divergence(hidden, head, ids, logprobs)
    (loss * 3).backward()
    found, hidden.grad = hidden.grad, None
    ours, theirs = (grouped(log_softmax(logits, -1), ids) for logits in (hidden @ head.T, teacher))
    expected = kl_div(ours, theirs, log_target=True, reduction="batchmean")
    (expected * 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, hidden.grad, rtol=1e-4, atol=1e-6)


def test_the_whole_vocabulary_gives_the_whole_divergence(case):
    hidden, head, teacher = case
    loss = kept_divergence(hidden, head, *kept_logprobs(teacher, 10 * VOCABULARY))
    logits = hidden @ head.T
    expected = kl_div(log_softmax(logits, -1), log_softmax(teacher, -1), log_target=True, reduction="batchmean")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_less_is_kept_less_is_seen(case):
    hidden, head, teacher = case
    losses = [kept_divergence(hidden, head, *kept_logprobs(teacher, k)).item() for k in (1, 4, 16, VOCABULARY)]
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_a_student_that_is_the_teacher_loses_nothing(case):
    hidden, head, _ = case
    loss = kept_divergence(hidden, head, *kept_logprobs((hidden @ head.T).detach(), 7))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert hidden.grad.abs().max() < 1e-6


def test_a_hidden_state_as_far_as_it_is_long(case):
    wanted = case[2]
    assert float(relative_distance(2 * wanted, wanted)) == pytest.approx(1.0)
    assert float(relative_distance(wanted, wanted)) == 0.0


def test_next_token_loss(case):
    hidden, head, _ = case
    ids = torch.arange(TOKENS) % VOCABULARY
    chosen = log_softmax(hidden @ head.T, -1)[torch.arange(TOKENS - 1), ids[1:]]
    assert next_token_loss(hidden, head, ids) == pytest.approx(-chosen.sum().item(), rel=1e-5)
