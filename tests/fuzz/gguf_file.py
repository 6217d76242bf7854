"""GGUF files taken apart and put together again. Written from ggml's specification, without the gguf package."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
SCALARS = {
    UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?", UINT64: "Q",
    INT64: "q", FLOAT64: "d",
}  # fmt: skip


@dataclass
class Field:
    """A key with its value. raw: the bytes of the value in place of those that fit; items: type of an array's items."""

    key: bytes
    type: int
    value: Any
    items: int = 0
    raw: bytes | None = None
    key_length: int | None = None


@dataclass
class Info:
    """A tensor's description; dims as in the file, fastest first."""

    name: bytes
    dims: list[int]
    type: int
    offset: int


@dataclass
class GGUFFile:
    """counts: (tensors, fields) as the header claims them, None: what is there; pad: zeros to the alignment."""

    fields: list[Field]
    infos: list[Info]
    data: bytes
    version: int = 3
    magic: bytes = b"GGUF"
    alignment: int = 32
    counts: list[int | None] = field(default_factory=lambda: [None, None])

    def find(self, key: str) -> Field:
        return next(f for f in self.fields if f.key == key.encode())

    def assemble(self) -> bytes:
        counts = [len(self.infos), len(self.fields)]
        counts = [n if claimed is None else claimed for n, claimed in zip(counts, self.counts, strict=True)]
        out = bytearray(self.magic + struct.pack("<I", self.version))
        out += b"".join(struct.pack("<Q", n & (2**64 - 1)) for n in counts)
        for f in self.fields:
            length = len(f.key) if f.key_length is None else f.key_length
            out += struct.pack("<Q", length) + f.key + struct.pack("<I", f.type)
            out += _value(f.type, f.value, f.items) if f.raw is None else f.raw
        for i in self.infos:
            out += struct.pack("<Q", len(i.name)) + i.name + struct.pack("<I", len(i.dims))
            out += b"".join(struct.pack("<Q", d & (2**64 - 1)) for d in i.dims)
            out += struct.pack("<IQ", i.type, i.offset & (2**64 - 1))
        out += bytes(-len(out) % self.alignment)
        return bytes(out + self.data)


def text(value: str | bytes) -> bytes:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def _value(type: int, value: Any, items: int) -> bytes:
    if type == STRING:
        return text(value)
    if type == ARRAY:
        return struct.pack("<IQ", items, len(value)) + b"".join(_value(items, v, 0) for v in value)
    if type not in SCALARS:
        return b""
    return scalar(type, value)


def scalar(type: int, value: Any) -> bytes:
    """`value` as `type`, wrapped where it does not fit."""
    code = SCALARS[type]
    if type == BOOL:
        return bytes([int(value) & 0xFF])
    if type in (FLOAT32, FLOAT64):
        try:
            return struct.pack("<" + code, float(value))
        except OverflowError:
            return struct.pack("<" + code, float("inf"))
    size = struct.calcsize("<" + code)
    return (int(value) & (2 ** (8 * size) - 1)).to_bytes(size, "little")


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.place)[0]
        self.place += struct.calcsize("<" + code)
        return value

    def text(self) -> bytes:
        length = self.take("Q")
        self.place += length
        return self.data[self.place - length : self.place]

    def value(self, type: int) -> tuple[Any, int]:
        if type == STRING:
            return self.text(), 0
        if type == ARRAY:
            items, count = self.take("I"), self.take("Q")
            return [self.value(items)[0] for _ in range(count)], items
        return self.take(SCALARS[type]), 0


def take_apart(data: bytes) -> GGUFFile:
    reader = _Reader(data)
    reader.place = 4
    version, tensors, fields = reader.take("I"), reader.take("Q"), reader.take("Q")
    found = []
    for _ in range(fields):
        key, type = reader.text(), reader.take("I")
        value, items = reader.value(type)
        found.append(Field(key, type, value, items))
    infos = []
    for _ in range(tensors):
        name = reader.text()
        dims = [reader.take("Q") for _ in range(reader.take("I"))]
        infos.append(Info(name, dims, reader.take("I"), reader.take("Q")))
    start = reader.place + -reader.place % 32
    return GGUFFile(found, infos, data[start:], version)
