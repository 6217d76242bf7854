"""`Batch`: what a forward pass knows about its tokens besides their ids. An argument, never a global."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedContext:
    """Where the requests of a batch live in the paged KV cache."""

    slot_mapping: Tensor  # [T] int64: kv_block * kv_block_size + offset, where each new token is written
    block_tables: Tensor  # [B, M] int64: kv_blocks of each request, in order
    context_lens: Tensor  # [B] int64: tokens in the cache, the new ones included
    fresh: bool  # no request has tokens in the cache from before this batch


@dataclass(frozen=True)
class Batch:
    """T tokens of B sequences packed one after another."""

    positions: Tensor  # [T] int64
    cu_seqlens: Tensor  # [B + 1] int64: tokens of sequence b are cu_seqlens[b] .. cu_seqlens[b + 1]
    max_position: int  # largest value in positions
    paged: PagedContext | None = None

    @property
    def last_tokens(self) -> Tensor:  # [B] int64
        """Index of each sequence's last token, the one whose logits are sampled."""
        return self.cu_seqlens[1:] - 1

    def alone(self, tokens: Tensor) -> tuple[Tensor, PagedContext]:  # [R] int64 -> bounds [R + 1], context
        """Some tokens, each as a request of its own over the cache, which must hold what they see."""
        assert self.paged is not None
        sequences = torch.searchsorted(self.cu_seqlens[1:], tokens, right=True)
        context = PagedContext(
            slot_mapping=self.paged.slot_mapping[tokens],
            block_tables=self.paged.block_tables[sequences],
            context_lens=self.positions[tokens] + 1,
            fresh=False,
        )
        return torch.arange(tokens.shape[0] + 1, device=tokens.device), context


def packed(
    lengths: Sequence[int], device: torch.device, starts: Sequence[int] | None = None, paged: PagedContext | None = None
) -> Batch:
    """Batch of sequences with `lengths` new tokens, sequence b beginning at position `starts[b]` (default 0)."""
    starts = starts if starts is not None else [0] * len(lengths)
    positions: list[int] = []
    bounds = [0]
    for start, length in zip(starts, lengths, strict=True):
        positions.extend(range(start, start + length))
        bounds.append(len(positions))
    return Batch(
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int64, device=device),
        max_position=max(positions),
        paged=paged,
    )
