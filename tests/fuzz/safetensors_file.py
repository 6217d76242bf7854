"""safetensors files taken apart and put together again, for mutants that get past the checks of whole files.

Written from the format's own description (8-byte little-endian header length, JSON header, data), without the
package's code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fuzz.json_text import dumps


@dataclass
class Tensor:
    """dtype: the format's name for it; data: its bytes."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class TensorFile:
    """metadata: the header's `__metadata__`; header: what stands in the file in place of the one that fits."""

    tensors: list[Tensor]
    metadata: Any = None

    def header(self) -> dict[str, Any]:
        """The header that fits, as a JSON object."""
        table: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        offset = 0
        for t in self.tensors:
            table[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [offset, offset + len(t.data)]}
            offset += len(t.data)
        return table

    def find(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)

    def assemble(self, header: bytes | None = None) -> bytes:
        text = dumps(self.header()).encode() if header is None else header
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text + b"".join(t.data for t in self.tensors)


def take_apart(data: bytes) -> TensorFile:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    metadata = header.pop("__metadata__", None)
    tensors = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        tensors.append(Tensor(name, entry["dtype"], entry["shape"], body[start:stop]))
    return TensorFile(tensors, metadata)
