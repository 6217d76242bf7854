"""What a sub-layer of a student is made of, in its parent's numbering."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """One sub-layer of the student: the parent's sub-layers merged into it, and the units it keeps of them.

    keep: indices of KV groups or channels in concatenation order; None keeps all.
    """

    sources: tuple[int, ...]
    keep: tuple[int, ...] | None = None
