"""The model's generation config: what ends its outputs and how it wants to be sampled."""

from __future__ import annotations

import json
import logging
from typing import Any

from depthprune_runtime.checkpoint.base import GENERATION_CONFIG_FILE, Checkpoint

_log = logging.getLogger("depthprune_runtime")


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's generation_config.json; empty where it has none, or a damaged one, which a warning names.

    Its values are as the file has them: of any type.
    """
    stored = checkpoint.assets.get(GENERATION_CONFIG_FILE)
    if stored is None:
        return {}
    try:
        found = json.loads(stored)
        reason = "" if isinstance(found, dict) else f"expected a JSON object, got {type(found).__name__}"
    except (ValueError, RecursionError) as error:
        reason = f"not JSON: {error}"
    if reason:
        _log.warning("%s: its %s is ignored: %s", checkpoint.name, GENERATION_CONFIG_FILE, reason)
        return {}
    return dict(found)
