"""ShortGPT: drop whole blocks, ranked once by Block Influence. Source: Men et al., arXiv 2403.03853.

    BI_i = 1 - E[ cos(x_i, x_{i+1}) ]    x_i entering block i, x_{i+1} leaving it

No re-scoring after a drop, no compensation. The last block's influence is measured before the final
norm; the official script measures it after, which inflates it and so never drops that block. Here
`protect_last` says it openly. The paper's other orders (`relative-magnitude`, `sequential`, `reverse`) protect
nothing: `reverse` drops the last block first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.calibration import CalibrationSet, stream_hidden_states
from depthprune_runtime.progress import Advance
from depthprune_runtime.pruning.amount import block_pairs
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.shortgpt.options import PROTECTED_SCORES, RANKINGS, Score
from depthprune_runtime.pruning.spans import dropped_blocks, equal_errors, evidence, span_errors


@dataclass(frozen=True)
class BlockScores:
    """Mean over calibration tokens, one entry a block."""

    block_influence: list[float]
    relative_magnitude: list[float]


def token_scores(entering: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:  # [..., C] twice -> [...] twice
    """1 - cos(x, y), and |f(x)| / |x + f(x)| with f(x) = y - x, per token, in float32."""
    x, y = entering.float(), leaving.float()
    influence = 1.0 - cosine_similarity(x, y, dim=-1)
    magnitude = (y - x).norm(dim=-1) / y.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return influence, magnitude


def score_blocks(
    checkpoint: Checkpoint, windows: Tensor, device: torch.device, dtype: torch.dtype, progress: Advance
) -> BlockScores:
    """Both data-driven scores of every block in one pass over `windows` [N, S]."""
    blocks = block_pairs(checkpoint.spec)
    influence = torch.zeros(len(blocks), dtype=torch.float64)
    magnitude = torch.zeros(len(blocks), dtype=torch.float64)
    entering: list[Tensor] = []
    begins = {attention for attention, _ in blocks}
    ends = {ffn: block for block, (_, ffn) in enumerate(blocks)}
    for i, before, after in stream_hidden_states(checkpoint, windows, device, dtype):
        if i in begins:  # remember what entered the block, in batch order
            entering.append(before)
            continue
        bi, rm = token_scores(entering.pop(0), after)
        influence[ends[i]] += bi.double().sum().cpu()
        magnitude[ends[i]] += rm.double().sum().cpu()
        if not entering:
            progress()
    tokens = windows.numel()
    return BlockScores((influence / tokens).tolist(), (magnitude / tokens).tolist())


def removal_order(score: Score, scores: BlockScores | None, count: int, protect_last: bool) -> list[int]:
    """All removable blocks, the first to go first. `sequential` goes from the front, `reverse` from the back."""
    if score == "sequential":
        order = list(range(count))
    elif score == "reverse":
        order = list(reversed(range(count)))
    else:
        assert scores is not None
        values = scores.block_influence if score == "block-influence" else scores.relative_magnitude
        if not all(math.isfinite(v) for v in values):
            bad = [i for i, v in enumerate(values) if not math.isfinite(v)]
            raise InputError(
                f"model: hidden states of blocks {bad} are not finite; they overflow, or its weights are damaged"
            )
        order = sorted(range(count), key=lambda b: values[b])
    return [b for b in order if not (protect_last and b == count - 1)]


def plan_shortgpt(
    checkpoint: Checkpoint,
    blocks: int,
    calibration: CalibrationSet,
    device: torch.device,
    dtype: torch.dtype,
    score: Score = "block-influence",
    protect_last: bool | None = None,
    parent_digest: str = "",
    progress: Advance = lambda: None,
) -> PrunePlan:
    """Drop the `blocks` blocks with the lowest score. (`after-repair` is `plan_after_repair`.)

    protect_last: never drop the last block; None: only with `block-influence`.
    """
    if score not in RANKINGS:
        raise InputError(f"score: expected one of {', '.join(RANKINGS)}, got {score!r}")
    if protect_last is None:
        protect_last = score in PROTECTED_SCORES
    pairs = block_pairs(checkpoint.spec)
    removable = len(pairs) - int(protect_last)
    if not 0 <= blocks <= removable or blocks >= len(pairs):
        raise InputError(f"blocks: expected 0 to {min(removable, len(pairs) - 1)} of {len(pairs)}, got {blocks}")
    data_driven = score in ("block-influence", "relative-magnitude")
    scores = score_blocks(checkpoint, calibration.windows, device, dtype, progress) if data_driven else None
    order = removal_order(score, scores, len(pairs), protect_last)
    gone = sorted(order[:blocks])
    settings = {
        "blocks": blocks,
        "score": score,
        "protect_last": protect_last,
        "calibration": calibration.description if data_driven else None,
        "removal_order": order,
        "scores": None
        if scores is None
        else {"block-influence": scores.block_influence, "relative-magnitude": scores.relative_magnitude},
    }
    edits = tuple(Drop(i) for block in gone for i in pairs[block])
    return PrunePlan("shortgpt", parent_digest, edits, settings)


def plan_after_repair(
    checkpoint: Checkpoint,
    blocks: int,
    calibration: CalibrationSet,
    device: torch.device,
    protect_last: bool = True,
    parent_digest: str = "",
    advance: Advance = lambda: None,
) -> PrunePlan:
    """Drop the `blocks` blocks whose spans leave the least error. The plan keeps every span's error."""
    pairs = block_pairs(checkpoint.spec)
    dropped_blocks(equal_errors(len(pairs)), len(pairs), blocks, protect_last)
    errors = span_errors(checkpoint, calibration.windows, device, checkpoint.dtype, advance=advance)
    gone = dropped_blocks(errors, len(pairs), blocks, protect_last)
    settings = {
        "blocks": blocks,
        "score": "after-repair",
        "protect_last": protect_last,
        "calibration": calibration.description,
        **evidence(errors),
    }
    return PrunePlan("shortgpt", parent_digest, tuple(Drop(i) for b in gone for i in pairs[b]), settings)
