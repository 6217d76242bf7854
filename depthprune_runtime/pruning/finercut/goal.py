"""FinerCut: how much goes, and which sub-layers may go next.

Front protection x, as the official code has it (its README's command sets 0.4, its script's default is 0.0). With
N = 2L sub-layers, the first int(N x / 2) + 1 blocks are no candidates until int(x N) + 1 sub-layers are gone. So
block 0 outlasts the first removal even with x = 0. Llama-3-8B at 0.4: blocks 0 to 12 of 32, until 26 are gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from depthprune_runtime.errors import InputError
from depthprune_runtime.pruning.amount import Amount, block_pairs, blocks_for_sparsity
from depthprune_runtime.pruning.finercut.options import KINDS, Kind
from depthprune_runtime.spec import DecoderSpec


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


def goal_of(amount: Amount, spec: DecoderSpec) -> Goal:
    """N blocks fewer means the parameters of N blocks."""
    if amount.sublayers is not None:
        return Goal(count=amount.sublayers)
    if amount.sparsity is not None:
        blocks_for_sparsity(spec, amount.sparsity, len(block_pairs(spec)) - 1)
        return Goal(sparsity=amount.sparsity)
    attention, ffn = block_pairs(spec)[0]
    one = spec.sublayer_parameters(attention) + spec.sublayer_parameters(ffn)
    return Goal(sparsity=amount.block_count(spec) * one / spec.num_parameters())


def check_choice(front_protection: float, only: Kind | None) -> None:
    """Refuse what `candidates` cannot work with."""
    if not (isinstance(front_protection, int | float) and 0.0 <= front_protection <= 1.0):
        raise InputError(f"front_protection: expected a number from 0 to 1, got {front_protection!r}")
    if only is not None and only not in KINDS:
        raise InputError(f"only: expected one of {', '.join(KINDS)}, got {only!r}")


def _of_kind(spec: DecoderSpec, only: Kind | None) -> list[int]:
    """Sub-layers of the kind `only`; None: of both."""
    return [i for i, sublayer in enumerate(spec.sublayers) if only in (None, sublayer.kind)]


def _gone_before_the_front(total: int, front_protection: float) -> int:
    """How many sub-layers must be gone before the protected blocks become candidates."""
    return int(front_protection * total) + 1


def candidates(spec: DecoderSpec, gone: list[int], front_protection: float, only: Kind | None = None) -> list[int]:
    """Sub-layers of a dense model that may go next, `gone` being gone already; empty where none may.

    only: the one kind of sub-layers that may go at all; the front is protected as if both could.
    """
    total = len(spec.sublayers)
    if len(gone) >= total - 1:
        return []  # one stays
    closed = set(gone)
    if len(gone) < _gone_before_the_front(total, front_protection):
        blocks = block_pairs(spec)
        closed.update(i for pair in blocks[: int(len(blocks) * front_protection) + 1] for i in pair)
    return [i for i in _of_kind(spec, only) if i not in closed]


def removable_sublayers(spec: DecoderSpec, front_protection: float, only: Kind | None = None) -> list[int]:
    """The sub-layers that a search can remove in all.

    One always stays, and so do those that the front protection never frees. Where any single one may stay,
    the list leaves out the largest: every search can reach the parameters of the others.
    """
    check_choice(front_protection, only)
    total = len(spec.sublayers)
    free = candidates(spec, [], front_protection, only)
    every = _of_kind(spec, only)
    if len(free) < min(len(every), _gone_before_the_front(total, front_protection)):
        return free
    return every if len(every) < total else sorted(every, key=spec.sublayer_parameters)[:-1]
