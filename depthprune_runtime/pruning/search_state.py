"""The state of a greedy search on disk, so that a killed search goes on where it was.

One JSON file, replaced as a whole after every step. Its key names everything that decides the search; how
many sub-layers are to go is not part of it, because a greedy ranking only grows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from depthprune_runtime.checkpoint.container import atomic_file
from depthprune_runtime.checkpoint.outputs import check_destination
from depthprune_runtime.errors import InputError
from depthprune_runtime.pruning.names import Kind
from depthprune_runtime.spec import from_fields


@dataclass(frozen=True)
class SearchKey:
    """What decides a search: model, tokens, options, and the dtype that it computes in.

    version: of the rules; a search of an older one would go on with another ranking.
    """

    parent_digest: str
    windows_sha256: str
    distance: str
    front_protection: float
    mode: str
    dtype: str
    only: Kind | None = None
    method: str = "finercut"
    version: int = 2


@dataclass(frozen=True)
class Step:
    """One removal: the how-manieth, what (parent's numbering), and the distance of the model without it.

    kind: attention or ffn; block: of the dense parent; evaluations: sub-layers run over the whole
    calibration set to decide it; plain_evaluations: what re-running the model for every candidate takes.
    """

    step: int
    sublayer: int
    kind: str
    block: int
    distance: float
    evaluations: float
    plain_evaluations: int


@dataclass
class SearchState:
    """Steps so far and, for the fast mode, the last known increment of the distance by each sub-layer."""

    key: SearchKey
    steps: list[Step] = field(default_factory=list)
    increments: dict[int, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Replace `path` by this state, whole or not at all."""
        data = {
            "key": asdict(self.key),
            "steps": [asdict(s) for s in self.steps],
            "increments": {str(i): v for i, v in self.increments.items()},
        }
        with atomic_file(path) as file:
            file.write(json.dumps(data, indent=1).encode())


def load_state(path: Path | None, key: SearchKey) -> SearchState:
    """The state at `path`, or a new one where there is none; a damaged file or another search's is refused."""
    if path is None:
        return SearchState(key)
    check_destination(path, overwrite=True)
    if not path.exists():
        return SearchState(key)
    hint = "delete it or choose another file"
    try:
        data: Any = json.loads(path.read_text())
        found = from_fields(SearchKey, data["key"], "key")
        steps = [from_fields(Step, s, "steps") for s in data["steps"]]
        increments = {int(i): float(v) for i, v in data["increments"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"search state {path}: damaged or of another kind ({error}); {hint}") from error
    differing = [n for n, value in asdict(key).items() if getattr(found, n) != value]
    if differing:
        expected = ", ".join(f"{n} {getattr(key, n)}" for n in differing)
        got = ", ".join(f"{n} {getattr(found, n)}" for n in differing)
        raise InputError(f"search state {path}: of another search: expected {expected}; got {got}; {hint}")
    return SearchState(found, steps, increments)
