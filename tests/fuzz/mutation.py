"""What every mutator hands on: the bytes of a mutant, and what was done to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Mutation:
    """One change.

    kind: the mutator's name for it; document: the file or part of a file it changed; path: keys from the root of the
    document to the value; meant: whether the change asks for another result, so that a different output is right.
    """

    kind: str
    document: str
    path: tuple[str | int, ...] = ()
    meant: bool = False

    def __str__(self) -> str:
        where = ".".join(map(str, self.path))
        return f"{self.kind} {self.document}{':' if where else ''}{where[:120]}"

    @property
    def names(self) -> set[str]:
        """Words of which a message about this change should hold one."""
        return {str(key) for key in self.path if not isinstance(key, int)} | {self.document}


@dataclass(frozen=True)
class Mutant:
    """A changed input of one format.

    original: name of what was changed; files: name -> contents, all of them; target: the one to open, "." for the
    folder; payload: what a format without files hands to its use; extra: a longer job after loading, or "".
    """

    format: str
    seed: int
    original: str
    mutations: tuple[Mutation, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    target: str = "."
    payload: Any = None
    extra: str = ""

    def __str__(self) -> str:
        return f"{self.format} seed {self.seed} of {self.original}: " + "; ".join(map(str, self.mutations))

    @property
    def meant(self) -> bool:
        return any(m.meant for m in self.mutations)

    @property
    def chats(self) -> bool:
        """Whether to render the chat template: where it may have changed, and now and then."""
        about = ("chat", "tokenizer", "special", ".json", ".gguf")
        return (
            self.seed % 8 == 7
            or any(part in m.document for m in self.mutations for part in about)
            or not self.mutations
        )
