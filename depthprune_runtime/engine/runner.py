"""`Runner`: turns a step over running requests into one batch and returns the logits to sample from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from depthprune_runtime.engine.kv_cache import KVCache
from depthprune_runtime.model.batch import PagedContext, packed
from depthprune_runtime.model.decoder import Decoder


class Runner:
    """A decoder with its KV cache. tables: kv_blocks of each request."""

    def __init__(self, decoder: Decoder, cache: KVCache, tables: Sequence[Sequence[int]]) -> None:
        self._decoder = decoder
        self._cache = cache
        self._tables = tables

    def step(
        self,
        requests: Sequence[int],  # indices into the tables
        new_tokens: Sequence[Sequence[int]],  # ids not yet in the cache, one sequence a request
        context_lens: Sequence[int],  # tokens of each request already in the cache
    ) -> Tensor:  # [B, V]
        """Append the new tokens to the cache; logits after the last new token of each request."""
        device = self._decoder.device
        size = self._cache.kv_block_size
        slots: list[int] = []
        for request, tokens, start in zip(requests, new_tokens, context_lens, strict=True):
            table = self._tables[request]
            slots += [table[p // size] * size + p % size for p in range(start, start + len(tokens))]
        tables = [list(self._tables[r]) for r in requests]
        width = max(map(len, tables))
        lengths = [len(t) for t in new_tokens]
        paged = PagedContext(
            slot_mapping=torch.tensor(slots, device=device),
            block_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables], device=device),
            context_lens=torch.tensor([c + n for c, n in zip(context_lens, lengths, strict=True)], device=device),
            fresh=not any(context_lens),
        )
        batch = packed(lengths, device, context_lens, paged)
        ids = torch.tensor([t for tokens in new_tokens for t in tokens], device=device)
        hidden = self._decoder.hidden_states(ids, batch, self._cache.pairs, select=batch.last_tokens)
        return self._decoder.logits(hidden)
