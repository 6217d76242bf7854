"""Options are frozen dataclasses: what their fields check, and what the command line says of them.

    @dataclass(frozen=True)
    class Options:
        lam: float = field(default=0.05, metadata=flag("relative to the mean of the Gram diagonal", metavar="L"))

        def __post_init__(self) -> None:
            check_number("lam", self.lam, 0.0)

`cli.flags` makes `--lam L` of the field; its annotation says which values it takes. Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from depthprune_runtime.errors import InputError

_FLAG = "flag"  # key of a field's metadata


@dataclass(frozen=True)
class Flag:
    """How the command line shows a field.

    name: of the flag, in place of the field's; metavar: of its value; writes: the field names a file that is written;
    off: name of a switch that sets a true-or-false field to False and replaces its flag; alias: name of a switch, and
    the value that it sets.
    """

    help: str
    name: str = ""
    metavar: str | None = None
    writes: bool = False
    off: str = ""
    alias: tuple[str, object] | None = None


def flag(
    help: str,
    *,
    name: str = "",
    metavar: str | None = None,
    writes: bool = False,
    off: str = "",
    alias: tuple[str, object] | None = None,
) -> dict[str, Flag]:
    """Metadata of a dataclass field that is to have a flag; see `Flag`."""
    return {_FLAG: Flag(help, name, metavar, writes, off, alias)}


def flags(options: type) -> Iterator[tuple[dataclasses.Field[Any], Flag]]:
    """The fields of `options` that the command line shows."""
    for one in dataclasses.fields(options):
        if _FLAG in one.metadata:
            yield one, one.metadata[_FLAG]


def written(options: object) -> Iterator[tuple[str, str]]:
    """(field, path) of the files that these options let a job write."""
    for one, shown in flags(type(options)):
        path = getattr(options, one.name)
        if shown.writes and path is not None:
            yield one.name, path


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:  # type: ignore[operator]
        raise InputError(f"{name}: expected a number from {low} to {high}, got {value!r}")


def check_flags(options: object, *names: str) -> None:
    for name in names:
        if not isinstance(value := getattr(options, name), bool):
            raise InputError(f"{name}: expected True or False, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of things of which there is at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}: expected an integer from 1 on, got {value!r}")


def check_count_or_none(name: str, value: object) -> None:
    """None leaves the number to the purpose."""
    if value is not None:
        check_count(name, value)
