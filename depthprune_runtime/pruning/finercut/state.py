"""The state of a greedy search on disk, so that a killed search goes on where it was.

One JSON file, replaced as a whole after every step, with a checksum of what it says. Its key names everything that
decides the search; how many sub-layers are to go is not part of it, because a greedy ranking only grows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from depthprune_runtime.checkpoint.container import atomic_file
from depthprune_runtime.checkpoint.gate import read_object
from depthprune_runtime.checkpoint.outputs import check_destination
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.fields import checked, from_fields
from depthprune_runtime.plan import Step
from depthprune_runtime.pruning.finercut.options import Kind
from depthprune_runtime.spec import DecoderSpec

__all__ = ["SearchKey", "SearchState", "Step", "load_state"]

_HINT = "delete it or choose another file"
_MAX_BYTES = 1 << 24  # of a state; one of 1,000 steps takes a quarter of a megabyte


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
class _Stored:
    """The file. checksum: of the rest; files of the first version have none."""

    key: SearchKey
    steps: tuple[Step, ...]
    increments: dict[str, float]
    checksum: str = ""


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
            file.write(json.dumps({**data, "checksum": _checksum(data)}, indent=1).encode())


def _checksum(data: dict[str, Any]) -> str:
    """32 hex digits over a state as JSON, whatever its spaces."""
    return xxhash.xxh3_128(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _check_steps(steps: tuple[Step, ...], spec: DecoderSpec) -> None:
    """Refuse a ranking that no search over `spec` writes."""
    count = len(spec.sublayers)
    for place, step in enumerate(steps, 1):
        if step.step != place or not step.sublayer < count:
            raise InputError(f"step {place}: expected one of {count} sub-layers in order, got {asdict(step)}")
        removed = spec.sublayers[step.sublayer]
        if (step.kind, step.block) != (removed.kind, removed.origin[0]):
            raise InputError(f"step {place}: sub-layer {step.sublayer} is not the {step.kind} of block {step.block}")
        if step.distance < 0:
            raise InputError(f"step {place}: distance: expected a number >= 0, got {step.distance}")
    if len({step.sublayer for step in steps}) != len(steps):
        raise InputError("steps: a sub-layer is removed twice")


def _increments(stored: dict[str, float], sublayers: int) -> dict[int, float]:
    known = {str(i): i for i in range(sublayers)}
    if unknown := sorted(set(stored) - set(known)):
        raise InputError(f"increments: expected sub-layers below {sublayers}, got {printable(unknown[0])}")
    return {known[i]: value for i, value in stored.items()}


def load_state(path: Path | None, key: SearchKey, spec: DecoderSpec) -> SearchState:
    """The state at `path`, or a new one where there is none.

    spec: of the dense model. Raises InputError for a damaged file, and for the state of another search.
    """
    if path is None:
        return SearchState(key)
    check_destination(path, overwrite=True)
    if not path.exists():
        return SearchState(key)
    name = f"search state {printable(path, 1000)}"
    try:
        data = read_object(path, _MAX_BYTES)
        found = checked(SearchKey, data.get("key"), "key")
    except InputError as error:
        raise InputError(f"{name}: damaged or of another kind ({error}); {_HINT}") from error
    differing = [n for n, value in asdict(key).items() if getattr(found, n) != value]
    if differing:
        expected = ", ".join(f"{n} {getattr(key, n)}" for n in differing)
        got = ", ".join(f"{n} {printable(getattr(found, n))}" for n in differing)
        raise InputError(f"{name}: of another search: expected {expected}; got {got}; {_HINT}")
    try:
        stored = from_fields(_Stored, data, "state")
        content = {name: value for name, value in data.items() if name != "checksum"}
        if stored.checksum != _checksum(content):
            raise InputError("its checksum is not that of its content")
        _check_steps(stored.steps, spec)
        increments = _increments(stored.increments, len(spec.sublayers))
    except InputError as error:
        raise InputError(f"{name}: damaged or of another kind ({error}); {_HINT}") from error
    return SearchState(found, list(stored.steps), increments)
