"""What the rendering of one template may use, and what it has used: steps, and the sizes of the values it makes."""

from __future__ import annotations

import contextvars
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

import jinja2
from jinja2.utils import Namespace

MAX_VALUE = 1 << 24  # characters of a text; 8 count for each element of a list
MAX_WORK = 1 << 27  # characters of all values that one rendering makes
MAX_STEPS = 200_000  # loop rounds and calls of one rendering
MAX_SECONDS = 5.0  # of processor time of one rendering
MAX_WIDTH = 1000  # of padding, indentation and other numbers that make text
MAX_BITS = 1 << 14  # of an integer


class TooMuch(jinja2.TemplateError):
    """The template asks for more than one rendering may take."""


class Meter:
    """What one rendering has used."""

    def __init__(self) -> None:
        self._steps = 0
        self._work = 0
        self._end = time.thread_time() + MAX_SECONDS
        self.sizes: dict[int, tuple[Any, int]] = {}

    def step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TooMuch(f"it takes more than {MAX_STEPS:,} loop rounds and calls")
        if self._steps % 64 == 0 and time.thread_time() > self._end:
            raise TooMuch(f"it takes more than {MAX_SECONDS:g} seconds of processor time")

    def work(self, size: int) -> None:
        self._work += size
        if self._work > MAX_WORK:
            raise TooMuch(f"it makes more than {MAX_WORK:,} characters of text")


METER: contextvars.ContextVar[Meter | None] = contextvars.ContextVar("meter", default=None)


def require_size(size: int) -> int:
    if size > MAX_VALUE:
        raise TooMuch(f"it makes a value of more than {MAX_VALUE:,} characters")
    return size


def size_of(*values: Any) -> int:
    """Characters that `values` stand for, written out. Raises TooMuch beyond the limit."""
    meter = METER.get()
    known = {} if meter is None else meter.sizes
    return require_size(sum(_size_with(value, known) for value in values))


def _size_with(value: Any, known: dict[int, tuple[Any, int]]) -> int:
    """known: id -> a container and its size; a template cannot change them, so each is looked through once."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise TooMuch("it makes too large a number")
        return ELEMENT
    if isinstance(value, range):
        return ELEMENT * len(value)
    if isinstance(value, Namespace):
        return sum(_size_with(inner, known) for inner in value._Namespace__attrs.values())
    if not isinstance(value, _CONTAINERS):
        return ELEMENT
    found = known.get(id(value))
    if found is not None:
        return found[1]
    inside = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    size = ELEMENT * len(value)
    for inner in inside:
        if isinstance(inner, Namespace):  # it could come to hold itself
            raise TooMuch("a namespace cannot be an element")
        size = require_size(size + _size_with(inner, known))
    known[id(value)] = (value, size)
    return size


ELEMENT = 8  # characters that an element of a list, or a number, counts for
_CONTAINERS = (list, tuple, set, frozenset, Mapping, KeysView, ValuesView, ItemsView)


def made(value: Any) -> Any:
    """`value`, which the template has made just now, if it may. What it contains was there before."""
    size = size_of(value)
    meter = METER.get()
    if meter is not None:
        meter.work(ELEMENT * len(value) if isinstance(value, _CONTAINERS) else size)
    return value


def step() -> bool:
    meter = METER.get()
    if meter is None:
        raise TooMuch("it can only be evaluated when it is rendered")
    meter.step()
    return True


def count(text: int) -> bool:
    """One more round, which writes so much text of the template itself."""
    step()
    meter = METER.get()
    if meter is not None:
        meter.work(text)
    return True
