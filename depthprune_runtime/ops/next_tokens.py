"""The end of a decode step on the device: choose tokens, see who stops, and set up the next step.

Nothing of it needs the host, so steps can follow one another without waiting for it. The state of B requests, updated
in place; a row that has ended (or never held a request) writes no keys, and its tokens mean nothing:

    ids [B]              the token of the next step            slots [B]      where its key and value go, -1: nowhere
    positions [B]        its position                          context_lens [B]   positions + 1; 1 of an ended row
    counts [B]           tokens chosen so far = row of `tokens` that is written next

A row with a slot is live.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthprune_runtime.ops._library import define


def _next_tokens(
    best: Tensor,
    candidates: Tensor,
    drawn: Tensor | None,
    stop_ids: Tensor,
    block_tables: Tensor,
    kv_block_size: int,
    ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    counts: Tensor,
    tokens: Tensor,
) -> None:
    largest, place = best.max(-1)
    chosen = candidates.gather(1, place[:, None])[:, 0].long()
    if drawn is not None:
        chosen = torch.where(drawn >= 0, drawn, chosen)
    chosen = torch.where(torch.isfinite(largest), chosen, -1)
    live = slots >= 0
    rows = torch.arange(ids.shape[0], device=ids.device)
    inside = live & (counts < tokens.shape[0])
    tokens[counts[inside], rows[inside]] = chosen[inside]
    counts.add_(inside)
    going = inside & (chosen >= 0) & ~(stop_ids == chosen[:, None]).any(1)
    positions.add_(going)
    block = (positions // kv_block_size).clamp_max(block_tables.shape[1] - 1)
    slot = block_tables[rows, block] * kv_block_size + positions % kv_block_size
    slots.copy_(torch.where(going, slot, -1))
    context_lens.copy_(torch.where(going, positions + 1, 1))
    ids.copy_(torch.where(going, chosen, ids))


_next_tokens_op = define(
    "next_tokens(Tensor best, Tensor candidates, Tensor? drawn, Tensor stop_ids, Tensor block_tables, "
    "int kv_block_size, Tensor(a!) ids, Tensor(b!) positions, Tensor(c!) slots, Tensor(d!) context_lens, "
    "Tensor(e!) counts, Tensor(f!) tokens) -> ()",
    _next_tokens,
)


def next_tokens(
    best: Tensor,  # [B, R] float32, from `norm_logits`
    candidates: Tensor,  # [B, R] int32
    drawn: Tensor | None,  # [B] int64, from `draw_tokens`: >= 0 where it is to be taken
    stop_ids: Tensor,  # [B, I] int64: tokens that end a request, filled up with -1
    block_tables: Tensor,  # [B, M] int64, with room for the steps to come
    kv_block_size: int,
    ids: Tensor,  # [B] int64
    positions: Tensor,  # [B] int64
    slots: Tensor,  # [B] int64
    context_lens: Tensor,  # [B] int64
    counts: Tensor,  # [B] int64
    tokens: Tensor,  # [steps, B] int64
) -> None:
    """The drawn or the most likely token of every live row, the first of equals; -1 where its logits are not finite.

    It goes to `tokens`; a stop token, -1, or a full `tokens` ends the row.
    """
    _next_tokens_op(
        best,
        candidates,
        drawn,
        stop_ids,
        block_tables,
        kv_block_size,
        ids,
        positions,
        slots,
        context_lens,
        counts,
        tokens,
    )
