"""A GGUF model in several files: `NAME-00001-of-00003.gguf` and so on, each with its own header and tensors.

Source of the format: llama.cpp's gguf-split; the first part holds the metadata, every part its number and the count.
"""

from __future__ import annotations

import re
from pathlib import Path

from depthprune_runtime.checkpoint.gguf_header import GGUFHeader, read_gguf_header
from depthprune_runtime.errors import InputError, printable

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MAX_PARTS = 99_999


def _split(header: GGUFHeader) -> tuple[int, int]:
    """(number from 0, count) of the part with `header`; (0, 1) for a file that is whole."""
    count, number = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
    if count == 0:
        count = 1
    if type(count) is not int or type(number) is not int or not 0 <= number < count <= _MAX_PARTS:
        raise InputError(
            f"{header.path}: damaged: it claims to be part {printable(repr(number))} of {printable(repr(count))}"
        )
    return number, count


def read_gguf_parts(path: Path) -> list[GGUFHeader]:
    """Headers of all parts of the model whose first part, or only file, is `path`. Raises InputError in one line."""
    first = read_gguf_header(path)
    number, count = _split(first)
    if count == 1:
        return [first]
    match = _PART.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise InputError(
            f"{path}: part {number + 1} of {count} under another name; expected NAME-{number + 1:05}-of-{count:05}.gguf"
        )
    name = f"{match[1]}-{{:05}}-of-{count:05}.gguf"
    if number != 0:
        raise InputError(f"{path}: part {number + 1} of {count}; give the first, {name.format(1)}")
    parts, seen = [first], set(first.tensors)
    for index in range(1, count):
        other = path.with_name(name.format(index + 1))
        if not other.is_file():
            raise InputError(f"{path}: its part {other.name} is missing; a split model moves as a whole")
        part = read_gguf_header(other)
        if _split(part) != (index, count):
            raise InputError(f"{other}: expected part {index + 1} of {count}, got a part of another model")
        if twice := sorted(seen & set(part.tensors)):
            raise InputError(f"{other}: tensor {printable(twice[0])} is in another part, too")
        seen |= set(part.tensors)
        parts.append(part)
    expected = first.metadata.get("split.tensors.count", len(seen))
    if expected != len(seen):
        raise InputError(f"{path}: expected {printable(expected)} tensors in its {count} parts, got {len(seen)}")
    return parts
