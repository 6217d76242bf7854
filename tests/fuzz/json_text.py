"""JSON as text that a careful writer would not make: raw fragments, duplicate keys."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Raw:
    """A value given as its JSON text, which need not be valid."""

    text: str


class Pairs(list[tuple[str, Any]]):
    """An object as pairs, so that keys may repeat."""


def dumps(value: Any) -> str:
    """Like `json.dumps` without spaces, with `Raw` and `Pairs`."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs | dict):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ",".join(f"{json.dumps(str(k))}:{dumps(v)}" for k, v in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)
