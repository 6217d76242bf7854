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
_CPU_ROWS = 16  # on a CPU, float32 copies of so few stay in its caches
_LEAST = 1e-12  # of a mass that is divided by


def kept_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [R, V] -> [R, k] int64, [R, k] float32
    """The k most likely tokens and their log-probabilities."""
    wide = logits.float()
    found = wide.topk(min(k, wide.shape[-1]), dim=-1)
    return found.indices, found.values - wide.logsumexp(-1, keepdim=True)


def _divergence(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:  # [R, V], [R, k], [R, k] -> [R] float32
    """L of every row; `logits` become its gradient."""
    wide = logits.float()
    most = wide.amax(-1, keepdim=True)
    kept = wide.gather(1, ids)
    shares = wide.sub_(most).exp_().scatter_(1, ids, 0.0)  # not yet divided by their sum
    rest = shares.sum(-1, keepdim=True)
    kept_shares = (kept - most).exp()
    total = rest + kept_shares.sum(-1, keepdim=True)
    rest = (rest / total).clamp_min(_LEAST)
    wanted = logprobs.exp()
    others = (1.0 - wanted.sum(-1, keepdim=True)).clamp_min(0.0)
    losses = (wanted * (logprobs - (kept - most - total.log()))).sum(-1, keepdim=True)
    losses += others * (others.clamp_min(_LEAST).log() - rest.log())
    shares.mul_((1.0 - others / rest) / total).scatter_(1, ids, kept_shares / total - wanted)
    if shares is not logits:
        logits.copy_(shares)
    return losses[:, 0]


class _KeptDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        tokens = hidden.shape[0]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for first in range(0, tokens, _ROWS):
            rows = slice(first, first + _ROWS)
            logits = linear(hidden[rows], head)
            some = _CPU_ROWS if hidden.device.type == "cpu" else _ROWS
            for parts in zip(logits.split(some), ids[rows].split(some), logprobs[rows].split(some), strict=True):
                total += _divergence(parts[0], parts[1], parts[2].float()).double().sum()
            if ctx.needs_input_grad[0]:
                torch.mm(logits, head, out=gradient[rows])
        ctx.save_for_backward(gradient.div_(tokens))
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
