"""How much a pruning run is to remove, checked before any long work. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import DecoderSpec


def block_pairs(spec: DecoderSpec) -> tuple[tuple[int, int], ...]:
    """(attention, FFN) indices of each block; only a model of whole blocks can lose whole blocks."""
    blocks = spec.whole_blocks()
    if blocks is None:
        raise InputError("model: expected whole blocks (attention, then FFN); this one has lost single sub-layers")
    return blocks


def blocks_for_sparsity(spec: DecoderSpec, sparsity: float, removable: int, share: float = 1.0) -> int:
    """Fewest blocks whose removal reaches `sparsity` of all parameters, embeddings included (as the papers count).

    share: of a block's parameters that one step removes (less than 1 where merged blocks stay wider).
    """
    if not (isinstance(sparsity, int | float) and 0.0 <= sparsity < 1.0):
        raise InputError(f"sparsity: expected a number from 0 to below 1, got {sparsity!r}")
    pairs = block_pairs(spec)
    per_block = share * max(sum(spec.sublayer_parameters(i) for i in pair) for pair in pairs)
    total = spec.num_parameters()
    if per_block <= 0 < sparsity:
        raise InputError("sparsity: blocks that stay wide remove no parameters; give blocks, or keep_width below 1")
    blocks = math.ceil(sparsity * total / per_block - 1e-9) if sparsity else 0
    if blocks > removable:
        raise InputError(
            f"sparsity: {sparsity} would take {blocks} blocks, only {removable} of {len(pairs)} can go; "
            f"the most is {removable * per_block / total:.3f} (embeddings count and stay)"
        )
    return blocks


@dataclass(frozen=True)
class Amount:
    """How much goes: exactly one of the three."""

    blocks: int | None = None
    sublayers: int | None = None
    sparsity: float | None = None

    def check(self) -> None:
        given = [n for n in ("blocks", "sublayers", "sparsity") if getattr(self, n) is not None]
        if len(given) != 1:
            raise InputError(
                f"expected exactly one of blocks, sublayers and sparsity, got {', '.join(given) or 'none'}"
            )

    def block_count(self, spec: DecoderSpec, share: float = 1.0) -> int:
        removable = len(block_pairs(spec)) - 1  # at least one block stays, whichever it is
        if self.sparsity is not None:
            return blocks_for_sparsity(spec, self.sparsity, removable, share)
        blocks = self.blocks
        if isinstance(blocks, bool) or not isinstance(blocks, int) or not 0 <= blocks <= removable:
            raise InputError(f"blocks: expected 0 to {removable} of {removable + 1}, got {blocks!r}")
        return blocks
