"""The state of a run on disk, so that a killed one goes on where it was, to the same bits.

One file, replaced as a whole. It holds the trained tensors, the optimizer's, the step and the history. Its key names
everything that decides the run; a state of another run is refused.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune_runtime.checkpoint.container import atomic_file
from depthprune_runtime.errors import InputError, printable

VERSION = 1
_DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, OSError)


@dataclass
class HealState:
    """step: steps done; trained: parameters by name; optimizer: its `state_dict`; history: reports so far."""

    step: int
    trained: dict[str, Tensor]
    optimizer: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path, key: dict[str, Any]) -> None:
        """Replace `path` by this state, whole or not at all."""
        content = {"version": VERSION, "key": json.dumps(key, sort_keys=True), **vars(self)}
        with atomic_file(path) as file:
            torch.save(content, file)


def load_state(path: Path, key: dict[str, Any]) -> HealState | None:
    """The state at `path`; None where there is none. Raises InputError for a damaged one, or that of another run."""
    if not path.exists():
        return None
    name = f"state {printable(path, 1000)}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, stored = content["version"], json.loads(content["key"])
        state = HealState(content["step"], content["trained"], content["optimizer"], content["history"])
    except _DAMAGE as error:
        raise InputError(f"{name}: damaged or of another kind; begin anew with --force") from error
    if version != VERSION:
        raise InputError(f"{name}: expected version {VERSION}, got {printable(version)}; begin anew with --force")
    wanted = json.loads(json.dumps(key, sort_keys=True))
    if differing := sorted(n for n in wanted.keys() | stored.keys() if wanted.get(n) != stored.get(n)):
        first = differing[0]
        raise InputError(
            f"{name}: of another run: expected {first} {printable(wanted.get(first), 80)}, "
            f"got {printable(stored.get(first), 80)}; give the same options and texts, or begin anew with --force"
        )
    return state
