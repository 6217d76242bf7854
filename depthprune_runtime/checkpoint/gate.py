"""The gate: whatever bytes a file holds, reading it ends in values that were checked or in one `InputError`.

`reading` turns what opening and parsing can raise into one line. `parse_json` reads JSON of unknown origin:
bounded in size, depth and numbers, without duplicate keys.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from depthprune_runtime.errors import InputError, printable

__all__ = ["parse_json", "parse_object", "printable", "read_object", "reading"]

MAX_JSON_BYTES = 1 << 28
MAX_JSON_DEPTH = 64  # configs and tokenizers nest below 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# what reading bytes that are not what they claim can raise; any other kind is a defect of ours
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
    MemoryError,
    EOFError,
    OSError,
    struct.error,
    SafetensorError,
)


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError) and error.args:
        return f"key {printable(repr(error.args[0]))} is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it claims more than the memory holds"
    return printable(" ".join(str(error).split())) or type(error).__name__


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """A body that reads `path`: what a damaged or hostile file makes it raise becomes one InputError that names it.

    An InputError of the body passes; one that does not name the path gets it in front.
    """
    name = printable(path, 1000)
    try:
        yield
    except InputError as error:
        if name in str(error):
            raise
        raise InputError(f"{name}: {error}") from error
    except _DAMAGE as error:
        raise InputError(f"{name}: cannot be read: {_reason(error)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {printable(repr(twice))} comes twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {printable(text, 40)} is too large")
    return value


def _too_deep(value: object) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            return False
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
    return bool(level)


def parse_json(data: bytes, what: str, max_bytes: int = MAX_JSON_BYTES, integer_bits: int = 64) -> object:
    """The JSON value in `data`; InputError in one line that begins with `what`, the file's name.

    Refused are other encodings than UTF-8, more than `max_bytes`, more than `MAX_JSON_DEPTH` levels, keys that come
    twice, NaN, infinite numbers, integers that do not fit `integer_bits` signed bits, and lone surrogates.
    """
    if len(data) > max_bytes:
        raise InputError(f"{what}: expected at most {max_bytes:,} bytes of JSON, got {len(data):,}")
    bound = 1 << (integer_bits - 1)

    def integer(text: str) -> int:
        value = int(text) if len(text) <= integer_bits else bound
        if not -bound <= value < bound:
            raise ValueError(f"integer {printable(text, 40)} does not fit {integer_bits} bits")
        return value

    try:
        value: object = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=integer,
        )
        if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH and _too_deep(value):
            raise RecursionError
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: not JSON: it is not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: a text in it holds half a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise InputError(f"{what}: expected at most {MAX_JSON_DEPTH} levels of nesting, got more") from error
    except ValueError as error:
        raise InputError(f"{what}: not JSON: {printable(error)}") from error
    return value


def parse_object(data: bytes, what: str, max_bytes: int = MAX_JSON_BYTES, integer_bits: int = 64) -> dict[str, Any]:
    """`parse_json` of a JSON object."""
    value = parse_json(data, what, max_bytes, integer_bits)
    if not isinstance(value, dict):
        raise InputError(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES, integer_bits: int = 64) -> dict[str, Any]:
    """The JSON object in file `path`; InputError in one line for anything else."""
    with reading(path):
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        return parse_object(data, str(path), max_bytes, integer_bits)
