"""Our own file: packed tensors, spec, plan, provenance, tokenizer and generation config in one.

`__metadata__` holds three strings: `format` = "depthprune", `depthprune` = the JSON below, `checksum` =
XXH3-128 of that JSON. Beside a config.json a stock Hugging Face loader would take such a file, find none
of its names and fill a model with random weights; the guard tensor has a name that every such model
wants and a shape that none accepts, so that it stops instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from depthprune_runtime.checkpoint.base import Checkpoint
from depthprune_runtime.checkpoint.container import (
    DTYPE_NAMES,
    DTYPES,
    TensorEntry,
    checksum,
    read_header,
    write_container,
)
from depthprune_runtime.errors import InputError
from depthprune_runtime.spec import DecoderSpec

FORMAT = "depthprune"
FORMAT_VERSION = 1
_ASSET_PREFIX = "assets."
_GUARD_NAME = "model.norm.weight"
_GUARD_TEXT = b"a depthprune checkpoint: load it with depthprune_runtime.Runtime.load"
_KEYS = {"format_version", "dtype", "spec", "plan", "provenance", "checksums"}


def _metadata_checksum(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()


class NativeCheckpoint(Checkpoint):
    """A file written by `write_native`, mapped into memory.

    verify: compare every tensor with its checksum now (memory speed; reads the whole file once).
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.name = str(path)
        self.path = path
        header = read_header(path)
        content = self._content(header)
        try:
            self.spec = DecoderSpec.from_json(content["spec"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        self.dtype = DTYPES[content["dtype"]]
        self.plan = content["plan"]
        self.provenance = content["provenance"]
        self._checksums: dict[str, str] = content["checksums"]
        self._check_tensors(header)
        try:
            self._file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged: {error}") from error
        self._asset_names = [n for n in self._checksums if n.startswith(_ASSET_PREFIX)]
        if verify:
            self.verify()

    def _content(self, header: Mapping[str, Any]) -> dict[str, Any]:
        metadata = header.get("__metadata__") or {}
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise InputError(
                f"{self.path}: not a depthprune checkpoint (no such format mark); for a Hugging Face model give its "
                "folder, not a file in it"
            )
        text = metadata.get(FORMAT)
        if not isinstance(text, str) or metadata.get("checksum") != _metadata_checksum(text):
            raise InputError(f"{self.path}: damaged: its description does not match its checksum")
        content = json.loads(text)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{self.path}: expected format version {FORMAT_VERSION}, got {version!r}; use the matching release"
            )
        if set(content) != _KEYS:
            raise InputError(f"{self.path}: expected keys {sorted(_KEYS)}, got {sorted(content)}")
        return dict(content)

    def _check_tensors(self, header: Mapping[str, Any]) -> None:
        """The header's names, dtypes and shapes against the spec's."""
        shapes = self.spec.tensor_shapes()
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        if set(entries) != set(self._checksums) or not set(shapes) <= set(entries):
            raise InputError(f"{self.path}: damaged: its tensors are not those that its description lists")
        for name, shape in shapes.items():
            entry = entries[name]
            if tuple(entry["shape"]) != shape or entry["dtype"] != DTYPE_NAMES[self.dtype]:
                raise InputError(
                    f"{self.path}: damaged: {name}: expected {DTYPE_NAMES[self.dtype]} {list(shape)}, "
                    f"got {entry['dtype']} {entry['shape']}"
                )

    def verify(self) -> None:
        """Read everything and compare with the checksums."""
        for name, expected in self._checksums.items():
            found = checksum(self.tensor(name))
            if found != expected:
                raise InputError(f"{self.path}: damaged: tensor {name} has checksum {found}, expected {expected}")

    @property
    def assets(self) -> Mapping[str, bytes]:
        return {n.removeprefix(_ASSET_PREFIX): self.tensor(n).numpy().tobytes() for n in self._asset_names}

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def checksums(self, on_tensor: Callable[[str], None] = lambda _: None) -> dict[str, str]:
        return {name: self._checksums[name] for name in self.spec.tensor_shapes()}


def write_native(
    path: Path,
    checkpoint: Checkpoint,
    on_tensor: Callable[[str], None] = lambda _: None,
) -> None:
    """Write any `checkpoint` (dense import or pruned view) as one self-contained file, streamed."""
    assets = {
        _ASSET_PREFIX + name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for name, data in sorted(checkpoint.assets.items())
        if data
    }
    assets[_GUARD_NAME] = torch.frombuffer(bytearray(_GUARD_TEXT), dtype=torch.uint8)[None]
    entries = [TensorEntry(n, checkpoint.dtype, s) for n, s in checkpoint.spec.tensor_shapes().items()]
    entries += [TensorEntry(n, t.dtype, tuple(t.shape)) for n, t in assets.items()]

    def metadata(checksums: Mapping[str, str]) -> Mapping[str, str]:
        content = {
            "format_version": FORMAT_VERSION,
            "dtype": DTYPE_NAMES[checkpoint.dtype],
            "spec": checkpoint.spec.to_json(),
            "plan": checkpoint.plan,
            "provenance": dict(checkpoint.provenance),
            "checksums": dict(checksums),
        }
        text = json.dumps(content, separators=(",", ":"))
        return {"format": FORMAT, FORMAT: text, "checksum": _metadata_checksum(text)}

    def tensor(name: str) -> Tensor:
        return assets[name] if name in assets else checkpoint.tensor(name)

    write_container(path, entries, tensor, metadata, lambda entry: on_tensor(entry.name))
