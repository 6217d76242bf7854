"""The header of a GGUF file: metadata and tensor table, parsed once, every claimed count checked against the file.

Source of the format: the GGUF specification of ggml. Versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from depthprune_runtime.checkpoint.gate import reading
from depthprune_runtime.errors import InputError, printable

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "u1", 10: "u8", 11: "i8", 12: "f8"}
_BOOL = 7
_MIN_FIELD = 8 + 4 + 1  # bytes: an empty key, its type, a value of one byte
_MIN_TENSOR = 8 + 4 + 4 + 8  # an empty name, no dimensions, type, offset
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the table: shape in torch's order, and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """metadata: key -> number, text, bool or list; tensors: by name; data: the mapped file, uint8 [size]."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    data: Any

    def raw(self, name: str) -> Any:
        """Bytes of tensor `name`, mapped, uint8 [nbytes]."""
        tensor = self.tensors[name]
        return self.data[tensor.offset : tensor.offset + tensor.nbytes]


class _Cursor:
    """A position in the mapped file that never passes its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self.at = 0

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self._size - self.at:
            raise InputError(
                f"truncated or damaged: {what} claims {nbytes:,} bytes at {self.at:,}, "
                f"{self._size - self.at:,} are left"
            )

    def number(self, kind: int, what: str) -> Any:
        dtype = np.dtype("<" + _NUMBERS[kind])
        self.need(dtype.itemsize, what)
        value = np.frombuffer(self._data, dtype, 1, self.at)[0].item()
        self.at += dtype.itemsize
        return bool(value) if kind == _BOOL else value

    def u32(self, what: str) -> int:
        return int(self.number(4, what))

    def u64(self, what: str) -> int:
        return int(self.number(10, what))

    def text(self, what: str) -> str:
        length = self.u64(what)
        self.need(length, what)
        self.at += length
        return self._data[self.at - length : self.at].decode("utf-8")

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings; a tight loop, for vocabularies are the bulk of a header."""
        self.need(8 * count, what)
        data, size, at, unpack = self._data, self._size, self.at, _LENGTH.unpack_from
        found = []
        for _ in range(count):
            if at + 8 > size:
                raise InputError(f"truncated or damaged: {what} ends beyond the file")
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > size:
                raise InputError(f"truncated or damaged: {what} ends beyond the file")
            found.append(data[start:at].decode("utf-8"))
        self.at = at
        return found

    def array(self, what: str) -> list[Any]:
        kind, count = self.u32(what), self.u64(what)
        if kind == _STRING:
            return self.texts(count, what)
        if kind not in _NUMBERS:
            raise InputError(f"{what}: arrays of value type {kind} are not supported")
        dtype = np.dtype("<" + _NUMBERS[kind])
        self.need(count * dtype.itemsize, what)
        values = np.frombuffer(self._data, dtype, count, self.at)
        self.at += count * dtype.itemsize
        found: list[Any] = (values != 0).tolist() if kind == _BOOL else values.tolist()
        return found

    def value(self, what: str) -> Any:
        kind = self.u32(what)
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _NUMBERS:
            raise InputError(f"{what}: value type {kind} is not known")
        return self.number(kind, what)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    cursor.need(count * _MIN_FIELD, f"a metadata count of {count:,}")
    found: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text("a metadata key")
        if key in found:
            raise InputError(f"damaged: metadata key {printable(key)} comes twice")
        found[key] = cursor.value(f"metadata key {printable(key)}")
    return found


def _table(cursor: _Cursor, count: int) -> list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]:
    cursor.need(count * _MIN_TENSOR, f"a tensor count of {count:,}")
    found = []
    for _ in range(count):
        name = cursor.text("a tensor name")
        what = f"tensor {printable(name)}"
        dimensions = cursor.u32(what)
        if dimensions > _MAX_DIMENSIONS:
            raise InputError(f"damaged: {what}: expected at most {_MAX_DIMENSIONS} dimensions, got {dimensions}")
        shape = tuple(reversed([cursor.u64(what) for _ in range(dimensions)])) or (1,)
        kind, offset = cursor.u32(what), cursor.u64(what)
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError as error:
            raise InputError(f"{what}: tensor type {kind} is not known to the gguf package") from error
        found.append((name, shape, quantization, offset))
    return found


def _placed(
    entry: tuple[str, tuple[int, ...], GGMLQuantizationType, int], start: int, alignment: int, size: int
) -> GGUFTensor:
    name, shape, kind, offset = entry
    what = f"tensor {printable(name)}"
    elements, nbytes = GGML_QUANT_SIZES[kind]
    total = 1
    for length in shape:
        total *= length  # Python integers do not overflow
    if not 0 < total <= size * elements or shape[-1] % elements:
        raise InputError(f"damaged: {what}: shape {list(shape)} does not fit {kind.name} or the file")
    end = start + offset + total // elements * nbytes
    if offset % alignment or end > size:
        raise InputError(f"truncated or damaged: {what} ends at byte {end:,}, the file has {size:,}")
    return GGUFTensor(name, shape, kind, start + offset, total // elements * nbytes)


def _parse(path: Path, data: mmap.mmap) -> GGUFHeader:
    cursor = _Cursor(data)
    cursor.at = len(MAGIC)
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        order = " (a big-endian file)" if version.to_bytes(4, "little")[::-1] in (b"\2\0\0\0", b"\3\0\0\0") else ""
        raise InputError(f"expected GGUF version 2 or 3, got {version}{order}")
    tensors, fields = cursor.u64("the tensor count"), cursor.u64("the metadata count")
    metadata = _metadata(cursor, fields)
    table = _table(cursor, tensors)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise InputError(f"general.alignment: expected a power of two, got {printable(repr(alignment))}")
    start = -(-cursor.at // alignment) * alignment
    placed: dict[str, GGUFTensor] = {}
    end = 0
    for entry in table:
        name, offset = entry[0], entry[3]
        if name in placed:
            raise InputError(f"damaged: tensor {printable(name)} comes twice")
        placed[name] = _placed(entry, start, alignment, len(data))
        if offset != end:  # as llama.cpp asks: a gap or an overlap is a wrong type, shape or offset
            raise InputError(
                f"damaged: tensor {printable(name)}: expected offset {end:,}, where the one before ends, got {offset:,}"
            )
        end = -(-(end + placed[name].nbytes) // alignment) * alignment
    if len(data) > start + end and table:  # what lies behind would be read nowhere, or all is shifted
        raise InputError(f"damaged, or of another alignment: expected {start + end:,} bytes, got {len(data):,}")
    return GGUFHeader(path, metadata, placed, np.frombuffer(data, np.uint8))


def read_gguf_header(path: Path) -> GGUFHeader:
    """Parse the header of `path` and map its data. Raises InputError in one line."""
    with reading(path):
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise InputError("not a GGUF file: it does not begin with GGUF")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(path, data)


def is_gguf(path: Path) -> bool:
    """Whether the file begins with GGUF's magic."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
