"""Values as callers and files give them: converted to plain Python, or refused in one line. Imports no torch.

Integers and numbers of numpy and torch count as such; booleans, text and bytes never do. What passes here is safe for
every array, kernel and random generator behind it.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from depthprune_runtime.errors import InputError

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: object) -> str:
    """`value` for a message: one line, short, whatever it is."""
    try:
        return " ".join(_short.repr(value).split())
    except Exception:  # an integer of more digits than Python prints, or a `__repr__` that fails
        return f"{type(value).__name__} that cannot be printed"


def refuse(name: str, expected: str, got: object) -> NoReturn:
    raise InputError(f"{name}: expected {expected}, got {shown(got)}")


def as_integer(value: Any) -> int | None:
    """`value` as an int; None if it is no integer."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool") or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except Exception:
        return None


def integer(name: str, value: object, least: int, most: int, note: str = "") -> int:
    """`value` as an int from `least` to `most`; note: what the limits mean, for the message."""
    found = as_integer(value)
    if found is None or not least <= found <= most:
        open_ended = most >= 2**31 - 1 and (found is None or found < least)
        expected = f"an integer >= {least}" if open_ended else f"an integer from {least} to {most}"
        refuse(name, expected + note, value)
    return found


def number(name: str, value: Any, least: float, most: float, above: bool = False) -> float:
    """`value` as a float from `least` (`above`: more than it) to `most`."""
    found: float | None
    try:
        found = value if type(value) is float else as_integer(value)
        if found is None and not isinstance(value, str | bytes | bytearray | bool) and not getattr(value, "ndim", 0):
            found = None if str(getattr(value, "dtype", "")).endswith("bool") else float(value)
        found = None if found is None else float(found)
    except Exception:  # no number, or too large for a float
        found = None
    if found is None or not least <= found <= most or (above and found == least):  # NaN is not between
        refuse(
            name,
            f"a number {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} {most:g}",
            value,
        )
    return found


def boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    refuse(name, "true or false", value)


def listed_values(name: str, value: Any, what: str) -> list[Any]:
    """The elements of a sequence, a set or a one-dimensional array; text, bytes and mappings are none."""
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # numpy and torch
        value = value.tolist()
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes | bytearray | memoryview):
        return list(value)
    refuse(name, what, value)


def token_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """Ids of tokens, all of the vocabulary."""
    ids = listed_values(name, value, "a sequence of token ids")
    if not all(type(i) is int for i in ids):
        ids = _converted(name, ids)
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InputError(f"{name}: expected token ids below {vocab_size}, got {shown(wrong)}")
    return ids


def _converted(name: str, ids: Iterable[Any]) -> list[int]:
    found = []
    for position, value in enumerate(ids):
        token = as_integer(value)
        if token is None:
            raise InputError(f"{name}: expected token ids, got {shown(value)} at index {position}")
        found.append(token)
    return found


def unicode_text(name: str, value: str) -> str:
    """`value`, if it is text that can be encoded: without lone surrogates, which bytes that are not UTF-8 leave."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: expected Unicode text, got {shown(value[error.start])} at character {error.start}, which is no "
            "character; decode the text as UTF-8"
        ) from None
    return value
