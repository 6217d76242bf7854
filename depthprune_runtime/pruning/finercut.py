"""FinerCut: drop single sub-layers, greedily, by how little the output changes. Source: Zhang et al.,
arXiv 2405.18218, and its official code.

    i_k = argmin over remaining i of  distance(dense model, model without i_1 .. i_{k-1} and i)

on the calibration set, once a removed sub-layer; see `distances`. With N = 2L sub-layers and front
protection p (official: 0.4), blocks below int(p N / 2) are no candidates until int(p N) + 1 sub-layers are
gone. The order of removal is the method's product: it shows which sub-layers the output depends on least.

`exact` scores every candidate in every step, from cached prefixes (`candidates`). `fast` is lazy-greedy:
a candidate's last known increment is the estimate of what it would add now. Each step re-scores the four
lowest estimates and the neighbours of the sub-layer that went last, whose increments change most, then
further ones in the order of estimates until the best beats the next estimate, reduced by a margin.
Increments are taken where independent removals add up: of the square of `angular` and `norm` (errors add in
quadrature), the logarithm of `perplexity`, and the divergences as they are.
A candidate seen for the first time is estimated on a fifth of the windows. benchmarks/bench_finercut.py compares both
with the plain loop.
"""

from __future__ import annotations

import bisect
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
from depthprune_runtime.model.decoder import Decoder
from depthprune_runtime.progress import Progress
from depthprune_runtime.pruning.calibration import CalibrationSet
from depthprune_runtime.pruning.candidates import CandidateScorer
from depthprune_runtime.pruning.distances import check_distance
from depthprune_runtime.pruning.names import Distance
from depthprune_runtime.pruning.plan import Drop, PrunePlan
from depthprune_runtime.pruning.search_state import SearchKey, SearchState, Step, load_state
from depthprune_runtime.pruning.shortgpt import block_pairs
from depthprune_runtime.spec import DecoderSpec

Mode = Literal["exact", "fast"]
MODES: tuple[Mode, ...] = get_args(Mode)

_FAST_BATCH = 4  # candidates re-scored together; they share their suffix
_OPTIMISM = 0.7  # of an old increment: what it may have shrunk to since
_NEIGHBOURS = 3  # remaining sub-layers before and after the last removed one that are always re-scored
_FAST_SHARE = 0.25  # of the candidates, at most, are re-scored in one step of the fast mode
_ROUGH_SHARE = 0.2  # of the windows give the first estimate of a candidate
_ROUGH_LEAST = 8  # candidates without an estimate for which that pays


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


@dataclass(frozen=True)
class Goal:
    """When to stop: `count` sub-layers gone, or the share `sparsity` of all parameters, embeddings included."""

    count: int | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.sparsity is None):
            raise InputError("expected exactly one of a number of sub-layers and a sparsity")

    def reached(self, spec: DecoderSpec, gone: list[int]) -> bool:
        if self.count is not None:
            return len(gone) >= self.count
        assert self.sparsity is not None
        removed = sum(spec.sublayer_parameters(i) for i in gone)
        return removed >= self.sparsity * spec.num_parameters() - 0.5

    def most_steps(self, spec: DecoderSpec, removable: list[int]) -> int:
        """Most steps that it can take; refuses a goal that `removable` cannot reach."""
        if self.count is not None:
            if isinstance(self.count, bool) or not isinstance(self.count, int) or not 0 <= self.count <= len(removable):
                raise InputError(
                    f"sublayers: expected 0 to {len(removable)} of {len(spec.sublayers)}, got {self.count!r}"
                )
            return self.count
        sparsity = self.sparsity
        if not (isinstance(sparsity, int | float) and 0.0 <= sparsity < 1.0):
            raise InputError(f"sparsity: expected a number from 0 to below 1, got {sparsity!r}")
        by_size = sorted(removable, key=spec.sublayer_parameters)
        steps = next((n for n in range(len(by_size) + 1) if self.reached(spec, by_size[:n])), None)
        if steps is None:
            most = sum(spec.sublayer_parameters(i) for i in by_size) / spec.num_parameters()
            raise InputError(
                f"sparsity: {sparsity} is more than the {len(removable)} sub-layers that can go hold; the most is "
                f"{most:.3f} (embeddings count and stay)"
            )
        return steps


def candidates(total: int, gone: list[int], front_protection: float) -> list[int]:
    """Sub-layers of `total` that may go next, `gone` being gone already; empty where none may."""
    protected = 2 * int(front_protection * total / 2)  # sub-layers of the first blocks
    first = 0 if len(gone) >= int(front_protection * total) + 1 else protected
    left = [i for i in range(total) if i not in gone]
    return [] if len(left) == 1 else [i for i in left if i >= first]


def removable_sublayers(spec: DecoderSpec, front_protection: float) -> list[int]:
    """As many sub-layers as a search can remove at all: one stays, and so do those protected for ever.

    Where everything can go but one, the largest stays in this list's place, so that its parameters are
    a share that every search reaches.
    """
    if not (isinstance(front_protection, int | float) and 0.0 <= front_protection <= 1.0):
        raise InputError(f"front_protection: expected a number from 0 to 1, got {front_protection!r}")
    total = len(spec.sublayers)
    free = candidates(total, [], front_protection)
    if 0 < len(free) < min(total, int(front_protection * total) + 1):
        return free
    return sorted(range(total), key=spec.sublayer_parameters)[:-1] if free else []


def _best(scores: dict[int, float]) -> int:
    """The candidate of the least distance; of equals, the first."""
    best = min(scores, key=lambda i: (scores[i], i))
    if not math.isfinite(scores[best]):
        raise InputError(
            "model: without any further sub-layer its logits are not finite; its weights are damaged or overflow "
            "in this dtype"
        )
    return best


def _additive(distance: str, value: float) -> float:
    """A growing function of `value` to which removals add roughly independently: see the module's docstring."""
    if distance in ("angular", "norm"):
        return value * value
    return math.log(value) if distance == "perplexity" else value


def _fast_scores(scorer: CandidateScorer, state: SearchState, allowed: list[int], base: float) -> dict[int, float]:
    """Distances of the most promising of `allowed`; `base` is the distance of the current model."""
    name = state.key.distance
    increments = state.increments
    level = _additive(name, base)
    new = [i for i in allowed if i not in increments]
    rough = math.ceil(_ROUGH_SHARE * scorer.windows)
    # The perplexity of other windows is another number; errors of the output are averages over windows.
    if len(new) >= _ROUGH_LEAST and rough < scorer.windows and name != "perplexity":
        increments.update({i: _additive(name, d) - level for i, d in scorer.score(new, rough).items()})
    queue = sorted((i for i in allowed if i in increments), key=lambda i: (increments[i], i))
    first = {i for i in allowed if i not in increments} | set(queue[:_FAST_BATCH])
    if state.steps:
        place = bisect.bisect(scorer.remaining, state.steps[-1].sublayer)
        first |= set(scorer.remaining[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]) & set(allowed)
    scores = scorer.score(sorted(first))
    queue = [i for i in queue if i not in first]
    cap = math.ceil(_FAST_SHARE * len(allowed))
    while queue and cap > 0:
        if _additive(name, min(scores.values())) <= level + _OPTIMISM * increments[queue[0]]:
            break
        batch, queue, cap = queue[:_FAST_BATCH], queue[_FAST_BATCH:], cap - _FAST_BATCH
        scores.update(scorer.score(batch))
    increments.update({i: _additive(name, d) - level for i, d in scores.items()})
    return scores


def _next_step(scorer: CandidateScorer, state: SearchState, front_protection: float, mode: Mode) -> Step:
    """Decide one removal and carry it out in `scorer`."""
    gone = [s.sublayer for s in state.steps]
    total = len(gone) + len(scorer.remaining)
    allowed = candidates(total, gone, front_protection)
    before = scorer.evaluations
    base = state.steps[-1].distance if state.steps else scorer.dense_distance
    scores = scorer.score(allowed) if mode == "exact" else _fast_scores(scorer, state, allowed, base)
    best = _best(scores)
    state.increments.pop(best, None)
    plain = len(allowed) * (len(scorer.remaining) - 1)
    scorer.remove(best)
    kind = ("attention", "ffn")[best % 2]
    return Step(len(gone) + 1, best, kind, best // 2, scores[best], scorer.evaluations - before, plain)


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
    state_file: Path | None = None,
    parent_digest: str = "",
    progress: Progress | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
) -> Ranking:
    """Rank the sub-layers of `checkpoint` by removing them one by one until `goal` is reached.

    distance: `js_reverse` is what the official code uses for Llama-3 and Mixtral; parent_digest: of the
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
    most = goal.most_steps(spec, removable_sublayers(spec, front_protection))
    if state_file is not None and not parent_digest:
        parent_digest = checkpoint.digest()
    tokens = hashlib.sha256(f"{list(windows.shape)}{windows.flatten().tolist()}".encode()).hexdigest()
    name = str(dtype).removeprefix("torch.")
    state = load_state(state_file, SearchKey(parent_digest, tokens, distance, float(front_protection), mode, name))

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
            state.steps.append(_next_step(scorer, state, front_protection, mode))
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
        "calibration": calibration.description,
        "ranking": ranking.to_json(),
        "evaluations": ranking.evaluations,
        "plain_evaluations": ranking.plain_evaluations,
    }
    edits = tuple(Drop(i) for i in sorted(s.sublayer for s in ranking.steps))
    return PrunePlan("finercut", parent_digest, edits, settings)
