"""What every part of a spec asks of its values, and fields that came later."""

from __future__ import annotations

import dataclasses
from typing import Any

from depthprune_runtime.errors import InputError, printable

MAX_INT = (1 << 63) - 1
MAX_FLOAT = 3.4028234663852886e38  # of float32, which positions and norms are computed in
_LATER = "later"


def later(default: Any) -> Any:
    """A field that older files do not have: it is written only where it differs from `default`."""
    return dataclasses.field(default=default, metadata={_LATER: True})


def changed(spec: Any) -> tuple[str, ...]:
    """Names of the later fields of dataclass `spec` that differ from their defaults."""
    fields = dataclasses.fields(spec)
    return tuple(f.name for f in fields if f.metadata.get(_LATER) and getattr(spec, f.name) != f.default)


def to_fields(spec: Any) -> dict[str, Any]:
    """Dataclass `spec` as a JSON object without later fields at their defaults."""
    data = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if not field.metadata.get(_LATER) or value != field.default:
            data[field.name] = to_fields(value) if dataclasses.is_dataclass(value) else value
    return data


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_int(owner: str, name: str, value: object, minimum: int) -> None:
    # no kernel counts further, and Python does not print every integer
    require(
        not isinstance(value, int) or abs(value) < 2**31,
        f"{owner}.{name}: expected an integer below 2**31, got a larger one",
    )
    good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(good, f"{owner}.{name}: expected an integer >= {minimum}, got {value!r}")


def require_bool(owner: str, name: str, value: object) -> None:
    require(isinstance(value, bool), f"{owner}.{name}: expected true or false, got {value!r}")


def require_origin(owner: str, origin: tuple[int, ...]) -> None:
    require(len(origin) > 0, f"{owner}.origin: expected at least one block of the dense parent")
    for block in origin:
        require_int(owner, "origin", block, 0)


def require_number(owner: str, name: str, value: object) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    good = good and 0 < value <= (MAX_INT if isinstance(value, int) else MAX_FLOAT)  # type: ignore[operator]
    shown = "a larger integer" if isinstance(value, int) and abs(value) > MAX_INT else printable(repr(value))
    require(good, f"{owner}.{name}: expected a positive number that float32 holds, got {shown}")
