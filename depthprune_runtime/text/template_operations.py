"""Operators, calls and filters of templates that are refused before they make far more than they are given."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2
from jinja2.filters import make_attrgetter
from jinja2.sandbox import SandboxedFormatter

from depthprune_runtime.text.template_meter import (
    MAX_BITS,
    MAX_WIDTH,
    METER,
    TooMuch,
    made,
    require_size,
    size_of,
    step,
)

_NO_METHODS = {"expandtabs", "maketrans", "to_bytes", "translate"}
_PADDING = {"center", "ljust", "rjust", "zfill"}
_SEARCHING = {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"}  # slow for a long argument
# what `%` formats by, but for names in parentheses; `%%` among them, so that what follows it is text
_SPECIFIERS = re.compile(r"%[-#0 +]*\d*(?:\.\d*)?[hlL]?.?", re.DOTALL)
_NUMBERS_MAKE_TEXT = {"batch", "center", "indent", "round", "slice", "tojson", "truncate"}


def add(left: Any, right: Any) -> Any:
    size = size_of(left, right)
    total = left + right
    meter = METER.get()
    if meter is not None and isinstance(total, list):  # lists are built up so; none is looked through anew
        meter.sizes[id(total)] = (total, size)
    return total


def multiply(left: Any, right: Any) -> Any:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
            require_size(size_of(sequence) * max(count, 0))
    return left * right


def power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_BITS:
        raise TooMuch("it makes too large a number")
    return left**right


def remainder(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_widths(left if "%(" in left else "".join(_SPECIFIERS.findall(left)))
        if re.search(r"%(\(.*?\))?[-#0 +]*(\*|\d*\.\*)", left):
            raise TooMuch("it formats text with a width that is an argument")
        require_size(len(left) + left.count("%") * size_of(right))
    return left % right


def _check_widths(text: str) -> None:
    """Refuse large numbers in a format."""
    if any(int(digits[:9]) > MAX_WIDTH for digits in re.findall(r"\d+", text)):
        raise TooMuch(f"it formats text with a number above {MAX_WIDTH}")


def _replaced(text: Any, old: Any, new: Any) -> None:
    """Refuse a replacement that makes too long a text."""
    text, old, new = str(text), str(old), str(new)
    times = text.count(old) if old else len(text) + 1
    require_size(len(text) + times * len(new))


def joined(separator: str, items: Iterable[Any]) -> str:
    """`separator.join` of texts that are measured one by one."""
    parts: list[str] = []
    total = 0
    for item in items:
        parts.append(item)
        total = require_size(total + len(separator) + len(item))
    return separator.join(parts)


class Formatter(SandboxedFormatter):
    """`str.format` with bounded widths and a bounded result."""

    _total = 0

    def format_field(self, value: Any, format_spec: str) -> str:
        _check_widths(format_spec)
        size_of(value)
        text = str(super().format_field(value, format_spec))
        self._total = require_size(self._total + len(text))
        return text


def check_call(function: Any, args: Sequence[Any]) -> None:
    """Refuse a call of a text's or number's own method that makes far more than it is given."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, str | bytes | int | float):
        return
    if name in _NO_METHODS:
        raise TooMuch(f"its sandbox has no {type(owner).__name__}.{name}")
    if name in _PADDING:
        _check_numbers(name, args)
    elif name in _SEARCHING and any(isinstance(a, str | bytes) and len(a) > MAX_WIDTH for a in args):
        raise TooMuch(f"it calls {name} with more than {MAX_WIDTH} characters")
    elif name == "replace" and len(args) > 1:
        _replaced(owner, args[0], args[1])


def _check_numbers(name: str, values: Iterable[Any]) -> None:
    if any(isinstance(v, int | float) and abs(v) > MAX_WIDTH for v in values):
        raise TooMuch(f"it calls {name} with a number above {MAX_WIDTH}")


def bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a call and whose values are measured."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # where the filtered value is

    @functools.wraps(function)  # with the mark that says what jinja passes first
    def bounded(*args: Any, **options: Any) -> Any:
        step()
        value, *others = args[first:]
        size = size_of(value, *others, *options.values())
        if name in _NUMBERS_MAKE_TEXT:
            _check_numbers(name, [*others, *options.values()])
        if name == "indent":
            width = next((v for v in [*others, *options.values()] if isinstance(v, int | str)), 4)
            require_size(size + (str(value).count("\n") + 1) * (width if isinstance(width, int) else len(width)))
        elif name == "tojson" and (others or options):
            require_size(size * (1 + _depth(value)))  # what its lines are indented by
        elif name == "replace" and len(others) > 1:
            _replaced(value, *others[:2])
        elif name == "format":
            return remainder(str(value), options or tuple(others))
        return made(function(*args, **options))

    return bounded


def _depth(value: Any) -> int:
    """Levels of containers in `value`, which is small enough to walk."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (
                outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list | tuple) else ()
            )
        ]
    return depth


@jinja2.pass_environment
def join_filter(environment: jinja2.Environment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return joined(str(d), map(str, value))


@jinja2.pass_environment
def sum_filter(
    environment: jinja2.Environment, iterable: Any, attribute: str | int | None = None, start: Any = 0
) -> Any:
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    total = start
    for item in iterable:
        total = made(add(total, item))
    return total
