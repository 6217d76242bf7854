"""Distillation on the logits: forward KL to what is kept of the teacher, without ever holding all logits.

Of the teacher's distribution p the k most likely tokens are kept, and the mass r of the others:

    L = sum_k p_k log(p_k / q_k) + r log(r / s)         s = 1 - sum_k q_k, the student's mass of the others

By the log-sum inequality L is at most the whole KL(p || q), and equal to it where k is the vocabulary. Its gradient
by the student's logits is q_j - p_j for a kept token and q_j (1 - r / s) for another one. Loss and gradient are
computed together, some rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

_ROWS = 128  # of logits at a time: [128, 49152] float32 is 25 MB
_LEAST = 1e-12  # of a mass that is divided by


def kept_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [R, V] -> [R, k] int64, [R, k] float32
    """The k most likely tokens and their log-probabilities."""
    wide = logits.float()
    found = wide.topk(min(k, wide.shape[-1]), dim=-1)
    return found.indices, found.values - wide.logsumexp(-1, keepdim=True)


def _divergence(logits: Tensor, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(L of every row [R], its gradient [R, V] in the memory of `logits`), all float32."""
    shares = logits.sub_(logits.logsumexp(-1, keepdim=True))  # log q
    kept = shares.gather(1, ids)
    shares.exp_().scatter_(1, ids, 0.0)
    rest = shares.sum(-1, keepdim=True).clamp_min(_LEAST)
    wanted = logprobs.exp()
    others = (1.0 - wanted.sum(-1, keepdim=True)).clamp_min(0.0)
    losses = (wanted * (logprobs - kept)).sum(-1, keepdim=True)
    losses += others * (others.clamp_min(_LEAST).log() - rest.log())
    gradient = shares.mul_(1.0 - others / rest).scatter_(1, ids, kept.exp() - wanted)
    return losses[:, 0], gradient


class _KeptDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        tokens = hidden.shape[0]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for first in range(0, tokens, _ROWS):
            rows = slice(first, first + _ROWS)
            logits = linear(hidden[rows], head).float()
            losses, by_logits = _divergence(logits, ids[rows], logprobs[rows].float())
            total += losses.double().sum()
            if ctx.needs_input_grad[0]:
                gradient[rows] = by_logits.div_(tokens).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return (total / tokens).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None


def kept_divergence(
    hidden: Tensor,  # [T, C], behind the last norm
    head: Tensor,  # [V, C], the dtype of hidden, not trained
    ids: Tensor,  # [T, k] int64
    logprobs: Tensor,  # [T, k], the teacher's
) -> Tensor:  # [], nats a token
    """L, the mean over the tokens."""
    loss: Tensor = _KeptDivergence.apply(hidden, head, ids, logprobs)  # type: ignore[no-untyped-call]
    return loss


def relative_distance(states: Tensor, wanted: Tensor) -> Tensor:  # [..., C] twice -> []
    """Mean over tokens of |x - y|^2 / |y|^2, y the teacher's."""
    target = wanted.float()
    return ((states - target).square().sum(-1) / target.square().sum(-1).clamp_min(_LEAST)).mean()


@torch.no_grad()
def next_token_loss(hidden: Tensor, head: Tensor, ids: Tensor) -> float:  # [T, C], [V, C], [T] int64
    """Sum over the window of -log q(next token), T - 1 predictions."""
    total = 0.0
    for first in range(0, ids.shape[0] - 1, _ROWS):
        last = min(first + _ROWS, ids.shape[0] - 1)
        logits = linear(hidden[first:last], head).float()
        total += float(cross_entropy(logits, ids[first + 1 : last + 1], reduction="sum").double())
    return total
