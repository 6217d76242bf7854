"""Arguments of `prune` in one flat dict, so that tables of tests stay short."""

from __future__ import annotations

import inspect
from typing import Any

from depthprune_runtime import prune
from depthprune_runtime.pruning.method import DEFAULT, method_options

ARGUMENTS = set(inspect.signature(prune).parameters)


def arguments(flat: dict[str, Any]) -> dict[str, Any]:
    """What `prune` takes: fields of the method's options become the options object."""
    own = {name: value for name, value in flat.items() if name not in ARGUMENTS}
    rest = {name: value for name, value in flat.items() if name in ARGUMENTS}
    return {**rest, "options": method_options(flat.get("method", DEFAULT), own)} if own else rest
