"""Files of ours with another header or description, every checksum over them correct."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header_text(path: Path, text: bytes, data: bytes) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def with_header(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """`source` with the header that `edit` makes of its own."""
    header, data = header_of(source)
    edit(header)
    return with_header_text(target, json.dumps(header).encode(), data)


def with_text(source: Path, target: Path, text: str) -> Path:
    """`source` with `text` as its description."""
    digest = xxhash.xxh3_128(text.encode("utf-8", "surrogatepass")).hexdigest()

    def edit(header: dict[str, Any]) -> None:
        header["__metadata__"] |= {"depthprune": text, "checksum": digest}

    return with_header(source, target, edit)


def with_description(source: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """`source` with the description that `edit` makes of its own."""
    description = json.loads(header_of(source)[0]["__metadata__"]["depthprune"])
    changed = edit(description)
    return with_text(source, target, json.dumps(description if changed is None else changed))
