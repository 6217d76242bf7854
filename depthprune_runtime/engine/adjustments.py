"""What a request changes in its logits before a token is chosen. The order is vLLM's:

    allowed_token_ids, bad_words, min_tokens    removed tokens become -inf
    logit_bias                                  l_t + b_t
    repetition_penalty                          l_t / p, or l_t * p below 0, of tokens in prompt or output
    frequency_penalty, presence_penalty         l_t - f * c_t - q * [c_t > 0],   c_t: how often t is in the output

A request that asks for none of them has no `Adjustment` and costs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from depthprune_runtime.engine.params import SamplingParams

REMOVED = -float("inf")
Words = Sequence[Sequence[int]]  # token ids of each bad word


def column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:  # [B, 1]
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def where(chosen: Sequence[bool], values: Tensor, function: Callable[[Tensor], Tensor], other: Tensor) -> Tensor:
    """`function` of the chosen rows of `values` [B, V]; of `other` [B, ...] where a row is not chosen."""
    if all(chosen):
        return function(values)
    if not any(chosen):
        return other
    rows = torch.tensor([i for i, yes in enumerate(chosen) if yes], device=values.device)
    return other.index_copy(0, rows, function(values[rows]))


def seen_tokens(prompt_ids: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:  # [V] bool
    """Which tokens a prompt has."""
    seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    seen[torch.tensor(list(prompt_ids), dtype=torch.int64, device=device)] = True
    return seen


def token_bias(params: SamplingParams, vocab_size: int, device: torch.device) -> Tensor | None:  # [V] float32
    """`allowed_token_ids` and `logit_bias` as what is added to the logits; None where neither is asked for."""
    if params.allowed_token_ids is None and not params.logit_bias:
        return None
    allowed = params.allowed_token_ids
    bias = torch.full((vocab_size,), 0.0 if allowed is None else REMOVED, device=device)
    if allowed is not None:
        bias[torch.tensor(allowed, dtype=torch.int64, device=device)] = 0.0
    if params.logit_bias:
        ids, values = zip(*params.bias_of_tokens, strict=True)
        bias[torch.tensor(ids, device=device)] += torch.tensor(values, dtype=torch.float32, device=device)
    return bias


class Adjustment:
    """State of one output. Each part is None where its parameters do not ask for it.

    seen: tokens of its prompt [V] bool, its own from here on; bias: [V] float32, shared and never changed; end_ids:
    what `min_tokens` keeps away; bad_words: token ids of each, the last of which is kept away behind the others.
    """

    def __init__(
        self,
        params: SamplingParams,
        seen: Tensor | None,
        bias: Tensor | None,
        vocab_size: int,
        device: torch.device,
        end_ids: Sequence[int] = (),
        bad_words: Words = (),
    ) -> None:
        self.params = params
        self.seen = None if params.repetition_penalty == 1.0 else seen
        self.bias = bias
        counted = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self.counts = torch.zeros(vocab_size, device=device) if counted else None  # [V] float32
        # a tokenizer may have tokens that the model has not: they never come
        self._end_ids = [token for token in end_ids if token < vocab_size]
        self._words = [tuple(word) for word in bad_words if max(word) < vocab_size]
        self._longest = max(map(len, self._words), default=0)
        self._tail: list[int] = []  # last tokens of the output, as many as a bad word can need
        self._num_tokens = 0

    @property
    def banned(self) -> list[int]:
        """Tokens that may not come next."""
        found = self._end_ids if self._num_tokens < self.params.min_tokens else []
        return found + [w[-1] for w in self._words if len(w) == 1 or self._tail[1 - len(w) :] == list(w[:-1])]

    def take(self, token: int) -> None:
        """Go on behind `token`."""
        self._num_tokens += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1.0
        if self._longest > 1:
            self._tail = [*self._tail, token][1 - self._longest :]


def penalize_repetition(
    logits: Tensor,  # [B, V]
    seen: Tensor,  # [B, V] bool: tokens of prompt or output
    penalty: Tensor,  # [B, 1]
) -> Tensor:  # [B, V]
    """Divide positive and multiply negative logits of `seen` tokens by `penalty` (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _penalize_counts(logits: Tensor, counts: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:  # [B, V]
    return logits - frequency * counts - presence * (counts > 0)


def _added(logits: Tensor, bias: Tensor) -> Tensor:
    return logits + bias


def adjusted(
    logits: Tensor,  # [B, V] float32
    adjustments: Sequence[Adjustment | None],  # B of them
) -> Tensor:  # [B, V], removed tokens -inf
    """The logits that a token is chosen from; a step costs only the rows that ask for it."""
    some = [a for a in adjustments if a is not None]
    biased = [a.bias for a in some if a.bias is not None]
    if biased:
        chosen = [a is not None and a.bias is not None for a in adjustments]
        logits = where(chosen, logits, partial(_added, bias=torch.stack(biased)), logits)
    banned = [(row, token) for row, a in enumerate(adjustments) if a is not None for token in a.banned]
    if banned:
        rows, tokens = torch.tensor(banned, device=logits.device).T
        logits = logits.index_put((rows, tokens), torch.tensor(REMOVED, device=logits.device))
    seen = [(a.seen, a.params.repetition_penalty) for a in some if a.seen is not None]
    if seen:
        masks, penalties = zip(*seen, strict=True)
        apply = partial(penalize_repetition, seen=torch.stack(masks), penalty=column(penalties, logits))
        logits = where([a is not None and a.seen is not None for a in adjustments], logits, apply, logits)
    counted = [(a.counts, a.params.frequency_penalty, a.params.presence_penalty) for a in some if a.counts is not None]
    if counted:
        counts, frequency, presence = zip(*counted, strict=True)
        columns = {"frequency": column(frequency, logits), "presence": column(presence, logits)}
        apply = partial(_penalize_counts, counts=torch.stack(counts), **columns)
        logits = where([a is not None and a.counts is not None for a in adjustments], logits, apply, logits)
    return logits
