"""Sizes in bytes as people write them: `5GB`, `500 MiB`, `200`. Imports no torch."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*")


def size_in_bytes(text: str) -> int | None:
    """Bytes that `text` says, rounded down.

    Args:
        text: a number without a sign, and a unit in letters of either case: none or B is bytes, KB to TB are powers of
            1000, KiB to TiB of 1024.

    Returns:
        The bytes, or None where `text` is no such size.
    """
    found = _SIZE.fullmatch(text)
    unit = None if found is None else _UNITS.get(found[2].upper())
    return None if found is None or unit is None else int(Fraction(found[1]) * unit)
