"""What `prune` gives back, whatever the architecture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from depthprune_runtime.plan import PrunePlan
from depthprune_runtime.spec import DecoderSpec


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did.

    path: what was written; plan: what decided it; parent_parameters, parameters: before and after, embeddings
    included, tied ones once; parent, spec: the sub-layers before and after; None for Mamba and RWKV, which the runtime
    does not run. In the plans of those a block counts as one sub-layer, and parent_digest is empty.
    """

    path: Path
    plan: PrunePlan
    parent_parameters: int
    parameters: int
    parent: DecoderSpec | None = None
    spec: DecoderSpec | None = None

    @property
    def sparsity(self) -> float:
        """Parameters removed / parent parameters."""
        return 1.0 - self.parameters / self.parent_parameters
