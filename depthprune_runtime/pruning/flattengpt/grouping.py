"""FlattenGPT, stage 1: which neighbouring blocks to merge. Source: arXiv 2602.08858. The paper's rule:

S[i, j] = mean cosine of the hidden states entering blocks i and j, over calibration tokens of the dense model.
Repeat: take the adjacent pair of groups with the largest similarity, merge it, delete column l - 1 and row l of
S. That rule equals contiguous complete linkage: joining groups [a..b] and [c..d] scores S[a, d].
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.calibration import CalibrationSet, stream_hidden_states
from depthprune_runtime.fitting.states import scratch_tensor
from depthprune_runtime.progress import Advance
from depthprune_runtime.pruning.amount import block_pairs
from depthprune_runtime.pruning.flattengpt.options import FlattenGPTOptions
from depthprune_runtime.pruning.plan import Flatten, PrunePlan
from depthprune_runtime.pruning.spans import MAX_SPAN, Errors, choose_spans, equal_errors, evidence, span_errors

_TOKENS_AT_ONCE = 8192  # all blocks' states of these are kept side by side; more take further passes


def input_similarity(
    checkpoint: Checkpoint,
    windows: Tensor,  # [N, S] int64
    device: torch.device,
    dtype: torch.dtype,
    advance: Advance = lambda: None,
) -> Tensor:  # [L, L] float64
    """Mean cosine between the hidden states entering every two blocks, over all tokens.

    advance: called once a block.
    """
    begins = {attention: block for block, (attention, _) in enumerate(block_pairs(checkpoint.spec))}
    blocks = len(begins)
    parts = windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1]))
    shape = (blocks, parts[0].numel(), checkpoint.spec.hidden_size)
    directions = scratch_tensor(shape, torch.float32, torch.device("cpu"))
    similarity = torch.zeros(blocks, blocks, dtype=torch.float64)
    done = 0
    for part in parts:
        tokens = part.numel()
        filled = 0
        for i, entering, _ in stream_hidden_states(checkpoint, part, device, dtype):
            if i not in begins:
                continue
            flat = normalize(entering.flatten(0, 1).float(), dim=-1).cpu()
            directions[begins[i], filled : filled + len(flat)] = flat
            filled = (filled + len(flat)) % tokens
            if filled == 0:
                done += 1
                if done % len(parts) == 0:
                    advance()
        rows = directions[:, :tokens].flatten(1)
        for chunk in rows.split(1 << 18, dim=1):  # float32 sums of 2^18 terms, added up in float64
            similarity += (chunk @ chunk.T).double()
    return similarity / windows.numel()


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


def groups_after_repair(errors: Errors, blocks: int, merges: int, pairs_only: bool = False) -> list[tuple[int, ...]]:
    """Groups of neighbouring blocks whose merging a repair mends best, all of them in order, single ones included.

    A span of `spans.Errors` joins the block before it, whose FFN can answer for it; that all units of the
    group compete for the width that stays can only lessen the error. The last block stays as it is.
    """
    allowed = {span: e for span, e in errors.items() if span[1] == 1 or not pairs_only}
    spans = choose_spans(allowed, blocks, merges, protect_last=True, protect_first=True)
    if sum(n for _, n in spans) != merges:
        limit = "pairs of neighbours only" if pairs_only else f"spans of at most {MAX_SPAN}"
        raise InputError(f"blocks: {merges} of {blocks} cannot merge ({limit}); ask for fewer, or grouping similarity")
    groups: list[tuple[int, ...]] = []
    lengths = dict(spans)
    block = 0
    while block < blocks:
        end = block + 1 + lengths.get(block + 1, 0)
        groups.append(tuple(range(block, end)))
        block = end
    return groups


def check_merges(blocks: int, merges: int, options: FlattenGPTOptions) -> None:
    """Refuse, before any work, what no grouping can do. options: with every `auto` decided."""
    if options.grouping == "after-repair":
        groups_after_repair(equal_errors(blocks), blocks, merges, options.pairs_only)
    elif options.pairs_only and merges > blocks // 2:
        raise InputError(f"blocks: expected at most {blocks // 2} fewer (pairs of neighbours only), got {merges}")


def flatten_edits(groups: list[tuple[int, ...]]) -> tuple[Flatten, ...]:
    return tuple(Flatten(g) for g in groups if len(g) > 1)


def plan_flattengpt(
    checkpoint: Checkpoint,
    merges: int,
    calibration: CalibrationSet,
    device: torch.device,
    options: FlattenGPTOptions,
    parent_digest: str = "",
    advance: Advance = lambda: None,
) -> PrunePlan:
    """Merge blocks until `merges` fewer are left. options: with every `auto` decided, see `FlattenGPT.resolved`."""
    blocks = len(block_pairs(checkpoint.spec))
    found: dict[str, Any]
    if options.grouping == "after-repair":
        errors = span_errors(checkpoint, calibration.windows, device, checkpoint.dtype, advance=advance)
        groups = groups_after_repair(errors, blocks, merges, options.pairs_only)
        found = evidence(errors)
    else:
        similarity = input_similarity(checkpoint, calibration.windows, device, checkpoint.dtype, advance)
        groups = group_blocks(similarity, merges, options.pairs_only)
        found = {
            "similarity": [similarity[i, i + 1 :].tolist() for i in range(blocks - 1)]
        }  # row i: to each later block
    settings = {
        "blocks": merges,
        **asdict(options),
        "groups": [list(g) for g in groups],
        **found,
        "calibration": calibration.description,
    }
    return PrunePlan("flattengpt", parent_digest, flatten_edits(groups), settings)
