"""FlattenGPT, stage 1: which neighbouring blocks to merge. Source: arXiv 2602.08858.

S[i, j] = mean cosine of the hidden states entering blocks i and j, over calibration tokens of the dense model.
Repeat: take the adjacent pair of groups with the largest similarity, merge it, delete column l - 1 and row l of
S. That rule equals contiguous complete linkage: joining groups [a..b] and [c..d] scores S[a, d].
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import normalize

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.progress import Advance
from depthprune_runtime.pruning.calibration import stream_hidden_states
from depthprune_runtime.pruning.plan import Flatten
from depthprune_runtime.pruning.shortgpt import block_pairs
from depthprune_runtime.pruning.states import scratch_tensor

_MAX_TOKENS = 8192  # of the similarity; all blocks' states of these are kept side by side


def input_similarity(
    checkpoint: Checkpoint,
    windows: Tensor,  # [N, S] int64
    device: torch.device,
    dtype: torch.dtype,
    advance: Advance = lambda: None,
) -> Tensor:  # [L, L] float64
    """Mean cosine between the hidden states entering every two blocks, over at most _MAX_TOKENS tokens."""
    blocks = len(block_pairs(checkpoint.spec))
    seq_len = windows.shape[1]
    windows = windows[: max(1, _MAX_TOKENS // seq_len)]
    tokens, hidden = windows.numel(), checkpoint.spec.hidden_size
    directions = scratch_tensor((blocks, tokens, hidden), torch.float32, torch.device("cpu"))
    filled = 0
    for i, entering, _ in stream_hidden_states(checkpoint, windows, device, dtype):
        if i % 2:
            continue
        flat = normalize(entering.flatten(0, 1).float(), dim=-1).cpu()
        directions[i // 2, filled : filled + len(flat)] = flat
        filled = (filled + len(flat)) % tokens
        if filled == 0:
            advance()
    rows = directions.view(blocks, -1)
    similarity = torch.zeros(blocks, blocks, dtype=torch.float64)
    for chunk in rows.split(1 << 18, dim=1):  # float32 sums of 2^18 terms, added up in float64
        similarity += (chunk @ chunk.T).double()
    return similarity / tokens


def group_blocks(similarity: Tensor, merges: int, pairs_only: bool = False) -> list[tuple[int, ...]]:
    """Groups of neighbouring blocks after `merges` merges, all of them in order, single ones included.

    pairs_only: no group larger than two. Raises InputError if so many merges are impossible.
    """
    groups: list[tuple[int, ...]] = [(i,) for i in range(similarity.shape[0])]
    for done in range(merges):
        candidates = [
            (float(similarity[a[0], b[-1]]), -i)
            for i, (a, b) in enumerate(itertools.pairwise(groups))
            if not pairs_only or len(a) + len(b) == 2
        ]
        if not candidates:
            limit = "pairs of neighbours only" if pairs_only else "all blocks merged into one"
            raise InputError(f"blocks: expected at most {done} fewer ({limit}), got {merges}")
        _, negative = max(candidates)  # of equal ones the first
        i = -negative
        groups[i : i + 2] = [groups[i] + groups[i + 1]]
    return groups


def flatten_edits(groups: list[tuple[int, ...]]) -> tuple[Flatten, ...]:
    return tuple(Flatten(g) for g in groups if len(g) > 1)
