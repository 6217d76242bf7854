"""Command-line flags out of the fields of options, see `depthprune_runtime.options`."""

from __future__ import annotations

import argparse
import types
import typing
from typing import Any

from depthprune_runtime.options import Flag, flags


def _name(prefix: str, field: str, flag: Flag) -> str:
    return prefix + (flag.name or field)


def _without_none(hint: Any) -> Any:
    """T of `T | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (inner for inner in typing.get_args(hint) if inner is not type(None))
    return hint


def _add_bool(group: Any, name: str, default: object, flag: Flag, dest: str) -> None:
    if flag.off:
        switch = f"--{flag.off.replace('_', '-')}"
        group.add_argument(switch, dest=dest, action="store_const", const=False, help=flag.help)
    elif default is False:
        group.add_argument(name, dest=dest, action="store_true", default=None, help=flag.help)
    else:
        group.add_argument(name, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=flag.help)


def add_flags(group: Any, options: type, prefix: str = "") -> None:
    """A flag for every field of `options` that is shown. What is not given is None, so that defaults have one home.

    A Literal becomes choices, a false bool a switch, any other bool --x and --no-x, the rest a value of its type.
    """
    hints = typing.get_type_hints(options)
    for field, flag in flags(options):
        dest = _name(prefix, field.name, flag)
        name = f"--{dest.replace('_', '-')}"
        hint = _without_none(hints[field.name])
        if hint is bool:
            _add_bool(group, name, field.default, flag, dest)
            continue
        if typing.get_origin(hint) is typing.Literal:
            choices = typing.get_args(hint)
            group.add_argument(name, dest=dest, type=type(choices[0]), choices=choices, help=flag.help)
        else:
            group.add_argument(name, dest=dest, type=hint, metavar=flag.metavar, help=flag.help)
        if flag.alias is not None:
            other, value = flag.alias
            same = f"the same as {name} {value:g}" if isinstance(value, float) else f"the same as {name} {value}"
            group.add_argument(f"--{other}", dest=dest, action="store_const", const=value, help=same)


def given(args: argparse.Namespace, options: type, prefix: str = "") -> dict[str, Any]:
    """Field -> value, of the flags that were given."""
    values = {field.name: getattr(args, _name(prefix, field.name, flag)) for field, flag in flags(options)}
    return {name: value for name, value in values.items() if value is not None}
