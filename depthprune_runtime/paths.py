"""Paths of what is read, as callers give them."""

from __future__ import annotations

import os
from pathlib import Path

from depthprune_runtime.errors import InputError, printable


def source_path(value: object, what: str) -> Path:
    """The path `value`, with `~` replaced by the home folder; whether something lies there is left open.

    what: what is read, for the message. Raises InputError for what is no path, or no name that a file can have.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InputError(f"{what}: expected a path, got {printable(repr(value))}")
    try:
        path = Path(value).expanduser()
        path.exists()  # raises where a question such as is_file would
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is closed, a home of nobody
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{what} {printable(value)}: cannot be read: {reason}") from error
    return path
