"""FinerCut: drop single sub-layers, greedily, by how little the output changes. Source: Zhang et al.,
arXiv 2405.18218, and its official code.

    i_k = argmin over remaining i of  distance(dense model, model without i_1 .. i_{k-1} and i)

on the calibration set, once a removed sub-layer; see `distances`, and `sublayer_goal` for the candidates of each
step (official: front protection 0.4, both kinds of sub-layers). The order of removal is the method's product: it
shows which sub-layers the output depends on least.

`exact` scores every candidate in every step, from cached prefixes (`candidates`); `fast` only the most promising
ones (`lazy_scores`). benchmarks/bench_finercut.py compares both with the plain loop.

The official script calibrates on the first 10 windows of 256 tokens of WikiText-2 train, its rows joined by blanks.
Here that is `prune(..., calibration="wikitext2-joined", seed=None)`, less the BOS token that its tokenizer may put
first; by default `prune` draws 10 windows from all over the text. The plan's settings tell text and windows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.calibration import CalibrationSet
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.progress import Progress
from depthprune_runtime.pruning.amount import block_pairs
from depthprune_runtime.pruning.finercut.candidates import CandidateScorer
from depthprune_runtime.pruning.finercut.distances import check_distance
from depthprune_runtime.pruning.finercut.goal import Goal, candidates, removable_sublayers
from depthprune_runtime.pruning.finercut.lazy_scores import lazy_scores
from depthprune_runtime.pruning.finercut.options import Distance, Kind
from depthprune_runtime.pruning.finercut.state import SearchKey, SearchState, Step, load_state
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.spec import DecoderSpec

Mode = Literal["exact", "fast"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Ranking:
    """Sub-layers in the order of removal, and what the search cost.

    evaluations: sub-layers run over the whole calibration set; plain_evaluations: what running the whole
    model for every candidate would have taken. Both without the one pass of the dense model.
    """

    steps: tuple[Step, ...]

    @property
    def evaluations(self) -> float:
        return sum(s.evaluations for s in self.steps)

    @property
    def plain_evaluations(self) -> int:
        return sum(s.plain_evaluations for s in self.steps)

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(s) for s in self.steps]


def _best(scores: dict[int, float]) -> int:
    """The candidate of the least distance; of equals, the first."""
    best = min(scores, key=lambda i: (scores[i], i))
    if not math.isfinite(scores[best]):
        raise InputError(
            "model: without any further sub-layer its logits are not finite; they overflow in this dtype (give bf16 or "
            "fp32), or its weights are damaged"
        )
    return best


def _next_step(scorer: CandidateScorer, state: SearchState, spec: DecoderSpec) -> Step:
    """Decide one removal and carry it out in `scorer`."""
    gone = [s.sublayer for s in state.steps]
    allowed = candidates(spec, gone, state.key.front_protection, state.key.only)
    before = scorer.evaluations
    base = state.steps[-1].distance if state.steps else scorer.dense_distance
    scores = scorer.score(allowed) if state.key.mode == "exact" else lazy_scores(scorer, state, allowed, base)
    best = _best(scores)
    state.increments.pop(best, None)
    plain = len(allowed) * (len(scorer.remaining) - 1)
    scorer.remove(best)
    removed = spec.sublayers[best]
    cost = scorer.evaluations - before
    distance = max(0.0, scores[best])  # a divergence that rounds to less than nothing
    return Step(len(gone) + 1, best, removed.kind, removed.origin[0], distance, cost, plain)


def _check_windows(windows: Tensor, spec: DecoderSpec) -> None:  # [N, S] int64
    if windows.dim() != 2 or windows.shape[0] < 1 or not 2 <= windows.shape[1] <= spec.max_position_embeddings:
        raise InputError(
            f"windows: expected shape [N, S] with S from 2 to the model's context of {spec.max_position_embeddings}, "
            f"got {list(windows.shape)}"
        )
    if int(windows.min()) < 0 or int(windows.max()) >= spec.vocab_size:
        raise InputError(f"windows: expected token ids from 0 to {spec.vocab_size - 1}, got others")


@torch.inference_mode()
def search(
    checkpoint: Checkpoint,
    windows: Tensor,  # [N, S] int64; official: 10 windows of 256 tokens
    device: torch.device,
    dtype: torch.dtype,
    goal: Goal,
    distance: Distance = "js_reverse",
    front_protection: float = 0.4,
    mode: Mode = "exact",
    only: Kind | None = None,
    state_file: Path | None = None,
    parent_digest: str = "",
    progress: Progress | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
) -> Ranking:
    """Rank the sub-layers of `checkpoint` by removing them one by one until `goal` is reached.

    distance: `js_reverse` is what the official code uses for Llama-3 and Mixtral; only: the one kind of sub-layers
    that may go (the official option `-lv a` is attention), None: both; parent_digest: of the
    checkpoint (`Checkpoint.digest`), computed if it is empty and a state file needs it; state_file: written
    after every step; a search that finds its own state there goes on from it, with the same result;
    on_step: called after each new step. The whole model is held in memory. Raises InputError for a goal
    that cannot be reached, and for a state file of another search.
    """
    spec = checkpoint.spec
    block_pairs(spec)  # refuses a model that has lost sub-layers: blocks could not be named
    check_distance(distance)
    if mode not in MODES:
        raise InputError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    _check_windows(windows, spec)
    most = goal.most_steps(spec, removable_sublayers(spec, front_protection, only))
    if state_file is not None and not parent_digest:
        parent_digest = checkpoint.digest()
    tokens = hashlib.sha256(f"{list(windows.shape)}{windows.flatten().tolist()}".encode()).hexdigest()
    name = str(dtype).removeprefix("torch.")
    key = SearchKey(parent_digest, tokens, distance, float(front_protection), mode, name, only)
    state = load_state(state_file, key, spec)

    def taken() -> list[int]:
        return [s.sublayer for s in state.steps]

    # a state that went further holds the answer already: a greedy ranking only grows
    for n in range(len(state.steps) + 1):
        if goal.reached(spec, taken()[:n]):
            return Ranking(tuple(state.steps[:n]))
    scorer = CandidateScorer(Decoder(spec, checkpoint.tensor, device, dtype), windows, distance)
    for index in taken():
        scorer.remove(index)
    with (progress or Progress()).stage("remove sub-layers", most) as advance:
        for _ in state.steps:
            advance()
        while not goal.reached(spec, taken()):
            state.steps.append(_next_step(scorer, state, spec))
            if state_file is not None:
                state.save(state_file)
            advance()
            on_step(state.steps[-1])
    return Ranking(tuple(state.steps))


def plan_finercut(
    checkpoint: Checkpoint,
    goal: Goal,
    calibration: CalibrationSet,
    device: torch.device,
    dtype: torch.dtype,
    distance: Distance = "js_reverse",
    front_protection: float = 0.4,
    mode: Mode = "exact",
    only: Kind | None = None,
    state_file: Path | None = None,
    parent_digest: str = "",
    progress: Progress | None = None,
) -> PrunePlan:
    """Drop the sub-layers that `search` ranks first; the whole ranking is kept in the plan's settings."""
    ranking = search(
        checkpoint,
        calibration.windows,
        device,
        dtype,
        goal,
        distance,
        front_protection,
        mode,
        only,
        state_file,
        parent_digest,
        progress,
    )
    settings = {
        "sublayers": goal.count,
        "sparsity": goal.sparsity,
        "distance": distance,
        "front_protection": front_protection,
        "mode": mode,
        "only": only,
        "calibration": calibration.description,
        "ranking": ranking.to_json(),
        "evaluations": ranking.evaluations,
        "plain_evaluations": ranking.plain_evaluations,
    }
    edits = tuple(Drop(i) for i in sorted(s.sublayer for s in ranking.steps))
    return PrunePlan("finercut", parent_digest, edits, settings)
