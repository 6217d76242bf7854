"""The one schema of everything that comes from JSON: frozen dataclasses, whose annotations say what a field may hold.

    @dataclass(frozen=True)
    class Step:
        block: int
        kinds: tuple[str, ...] = ()

    from_fields(Step, {"block": 3, "kinds": ["ffn"]}, "step")

Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from depthprune_runtime.errors import InputError, printable

_T = TypeVar("_T")
_MAX_INT = 1 << 63


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _wrong(what: str, expected: str, value: object) -> InputError:
    return InputError(f"{what}: expected {expected}, got {printable(repr(_small(value)))}")


def _small(value: object) -> object:
    """Something whose text is short to make: an integer of a million digits takes seconds, or is refused."""
    return "a larger integer" if isinstance(value, int) and abs(value) >= _MAX_INT else value


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= _MAX_INT:
        raise _wrong(what, "an integer of at most 63 bits", value)
    return value


def _number(value: object, what: str) -> float:
    """Integers stay integers: they are written as they were read."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or (isinstance(value, int) and abs(value) >= _MAX_INT) or not math.isfinite(value):  # type: ignore[arg-type]
        raise _wrong(what, "a finite number", value)
    return value  # type: ignore[return-value]


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _wrong(what, "a text", value)
    return value


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(what, "true or false", value)
    return value


_PLAIN = {int: _integer, float: _number, str: _text, bool: _flag}


def checked(hint: Any, value: object, what: str) -> Any:
    """`value` from JSON as the type `hint`; InputError that begins with `what` where it is of another one.

    Known are int, float, str, bool, dataclasses, `tuple[T, ...]`, `dict[str, T]`, Literal, Any, one of these or None,
    and unions of dataclasses that have been built before.
    """
    origin = typing.get_origin(hint)
    if hint is Any or hint is object:
        return value
    if hint in _PLAIN:
        return _PLAIN[hint](value, what)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_fields(typing.cast("type[Any]", hint), value, what)  # type: ignore[arg-type]
    if origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in typing.get_args(hint)):
            raise _wrong(what, f"one of {typing.get_args(hint)}", value)
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(typing.get_args(hint), value, what)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(what, "a list", value)
        inner = typing.get_args(hint)[0]
        return tuple(checked(inner, v, f"{what}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(what, "a JSON object", value)
        inner = typing.get_args(hint)[1]
        return {k: checked(inner, v, f"{what}.{printable(k)}") for k, v in value.items()}
    raise AssertionError(f"{what}: no rule for {hint}")


def _one_of(hints: tuple[Any, ...], value: object, what: str) -> Any:
    if value is None and type(None) in hints:
        return None
    others = [hint for hint in hints if hint is not type(None)]
    ready = [hint for hint in others if dataclasses.is_dataclass(hint)]
    if isinstance(value, tuple(hint for hint in ready if isinstance(hint, type))):
        return value
    if len(others) == 1:
        return checked(others[0], value, what)
    raise _wrong(what, f"one of {[getattr(hint, '__name__', str(hint)) for hint in hints]}", value)


def from_fields(cls: type[_T], data: object, what: str) -> _T:
    """Build dataclass `cls` from a JSON object; unknown and missing keys and wrong types are refused by name."""
    if not isinstance(data, dict):
        raise InputError(f"{what}: expected a JSON object, got {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(printable(key) for key in set(data) - set(fields))
    if unknown:
        raise InputError(f"{what}: unknown keys {unknown[:5]}; known are {sorted(fields)}")
    missing = sorted(
        n
        for n, f in fields.items()
        if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    if missing:
        raise InputError(f"{what}: missing keys {missing}")
    hints: dict[str, Any] = _hints(cls)  # type: ignore[arg-type]
    return cls(**{name: checked(hints[name], value, f"{what}.{name}") for name, value in data.items()})
