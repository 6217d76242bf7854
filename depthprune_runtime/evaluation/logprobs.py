"""Log-probabilities of given tokens, what perplexity and zero-shot scores are sums of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from depthprune_runtime.model.decoder import Decoder

_LOGIT_ROWS = 512  # rows of logits at a time: [512, 128k] float32 is 256 MB
# On a CPU, float32 copies of so few rows stay in its caches: 512 rows together take four times as long.
_CPU_ROWS = 16


class TokenLogprobs(NamedTuple):
    """logprobs: [R] float32, nats; greedy: [R] bool, whether the token is the arg-max (of equals, the first)."""

    logprobs: Tensor
    greedy: Tensor


def _of_logits(logits: Tensor, ids: Tensor) -> TokenLogprobs:  # [R, V], overwritten if float32; [R]
    wide = logits.float()
    chosen = wide.gather(1, ids[:, None])[:, 0]
    most = wide.amax(-1)
    greedy = chosen == most
    # arg-max is slow, and only of several tokens that are as likely as any does it choose one
    (likeliest,) = greedy.nonzero(as_tuple=True)
    tied = likeliest[(wide[likeliest] == most[likeliest, None]).sum(-1) > 1]
    greedy[tied] = wide[tied].argmax(-1) == ids[tied]
    total = wide.sub_(most[:, None]).exp_().sum(-1)
    return TokenLogprobs(chosen - most - total.log_(), greedy)


def token_logprobs(decoder: Decoder, hidden: Tensor, ids: Tensor) -> TokenLogprobs:  # [R, C], [R] int64
    """log softmax(logits(hidden))[ids] of every row, in float32 whatever the model computes in."""
    rows = _CPU_ROWS if hidden.device.type == "cpu" else _LOGIT_ROWS
    found = [
        _of_logits(logits, wanted)
        for some, targets in zip(hidden.split(_LOGIT_ROWS), ids.split(_LOGIT_ROWS), strict=True)
        for logits, wanted in zip(decoder.logits(some).split(rows), targets.split(rows), strict=True)
    ]
    return TokenLogprobs(torch.cat([f.logprobs for f in found]), torch.cat([f.greedy for f in found]))
