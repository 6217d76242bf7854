"""Our own file: packed tensors, spec, plan, provenance, tokenizer and generation config in one.

Quantised weights are stored as their parts (`stored`); the JSON says which weights those are. Large models are cut:
the same file without its weights, then called the head, and shards beside it (`shards`).

`__metadata__` holds three strings: `format` = "depthprune", `depthprune` = the JSON below, `checksum` =
XXH3-128 of that JSON. Beside a config.json a stock Hugging Face loader would take such a file, find none
of its names and fill a model with random weights; the guard tensor has a name that every such model
wants and a shape that none accepts, so that it stops instead. Shards carry it, too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from depthprune_runtime.checkpoint import shards, stored
from depthprune_runtime.checkpoint.assets import LazyAssets
from depthprune_runtime.checkpoint.base import Checkpoint
from depthprune_runtime.checkpoint.container import (
    DTYPE_NAMES,
    DTYPES,
    PendingFile,
    TensorEntry,
    atomic_files,
    checksum,
    read_header,
    write_entries,
)
from depthprune_runtime.checkpoint.description import FORMAT_VERSION, Description
from depthprune_runtime.checkpoint.gate import parse_object, reading
from depthprune_runtime.checkpoint.mapped import MappedFile
from depthprune_runtime.checkpoint.outputs import check_output
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.weights.quantized import QuantizedWeight
from depthprune_runtime.weights.rows import Stored, as_weight

FORMAT = "depthprune"
_ASSET_PREFIX = "assets."
_GUARD_NAME = "model.norm.weight"
_GUARD_TEXT = b"a depthprune checkpoint: load it with depthprune_runtime.Runtime.load"


def _metadata_checksum(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()


class NativeCheckpoint(Checkpoint):
    """A file written by `write_native`, with its shards if it has any, mapped into memory.

    verify: compare every tensor with its checksum now (memory speed; reads everything once).
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.name = str(path)
        self.path = path
        header = read_header(path)
        with reading(path):
            content = Description.from_json(self._content(header))
        self.spec, self.quantization = content.spec, content.quantization
        self.dtype = DTYPES[content.dtype]
        self.plan, self.provenance = content.plan, content.provenance
        self._checksums, self._weight_map = content.checksums, content.weight_map
        headers = {path.name: header, **self._shard_headers(content.shards)}
        self.source_files = tuple(path.with_name(name) for name in headers)
        with reading(path):
            self._check_tensors(headers)
        self._files = {name: MappedFile(path.with_name(name)) for name in headers}
        self.watched = tuple(self._files.values())
        self._asset_names = [n for n in self._checksums if n.startswith(_ASSET_PREFIX)]
        if verify:
            self.verify()

    def _content(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON in `header`, of which nothing is known yet but that it has not changed since it was written."""
        metadata = header.get("__metadata__") or {}
        if metadata.get("format") == shards.SHARD_FORMAT:
            raise InputError(
                f"{self.path}: one shard of a checkpoint; give its head, the file of the same name without "
                "-00000-of-00000-..."
            )
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{self.path}: not a depthprune checkpoint (no such format mark); for a Hugging Face model give its "
                "folder, not a file in it"
            )
        text = metadata.get(FORMAT)
        if text is None or metadata.get("checksum") != _metadata_checksum(text):
            raise InputError(f"{self.path}: damaged: its description does not match its checksum")
        return parse_object(text.encode(), "description")

    def _shard_headers(self, listed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Header of every shard; each must be the one that was written with this head."""
        if self.path.name in listed:
            raise InputError(f"{self.path}: damaged: its description lists it as a shard of its own")
        missing = sorted(n for n in listed if not self.path.with_name(n).is_file())
        if missing:
            raise InputError(
                f"{self.path}: {len(missing)} of its {len(listed)} shards are missing in its folder, "
                f"{printable(missing[0])} first; a checkpoint in several files moves as a whole"
            )
        return {name: read_header(self.path.with_name(name), expected) for name, expected in listed.items()}

    def _check_tensors(self, headers: Mapping[str, Mapping[str, Any]]) -> None:
        """The headers' names, dtypes and shapes against those that spec and quantisation ask for."""
        wanted = {weight.name: weight for group in self.entries().values() for weight in group}
        entries: dict[str, Any] = {}
        for file, header in headers.items():
            found = {k: v for k, v in header.items() if k != "__metadata__"}
            entries |= found
            listed = {n for n in self._checksums if self._weight_map.get(n, self.path.name) == file}
            if set(found) != (listed if file == self.path.name else listed | {_GUARD_NAME}):
                raise InputError(
                    f"{self.path.with_name(file)}: damaged: its tensors are not those that its description lists"
                )
        if not set(wanted) <= set(entries) or _GUARD_NAME not in self._checksums:
            raise InputError(f"{self.path}: damaged: its tensors are not those that its description lists")
        for expected in wanted.values():
            entry, dtype = entries[expected.name], DTYPE_NAMES[expected.dtype]
            if tuple(entry["shape"]) != expected.shape or entry["dtype"] != dtype:
                raise InputError(
                    f"{self.path}: damaged: {expected.name}: expected {dtype} {list(expected.shape)}, "
                    f"got {printable(entry['dtype'])} {printable(entry['shape'])}"
                )
        for name in set(entries) - set(wanted):
            known = name == _GUARD_NAME or name.startswith(_ASSET_PREFIX)
            if not known or entries[name]["dtype"] != "U8":
                raise InputError(f"{self.path}: damaged: {printable(name)} is neither a weight nor a file in bytes")

    def verify(self) -> None:
        """Read everything and compare with the checksums."""
        where = [(self._weight_map.get(n, self.path.name), n) for n in self._checksums]
        where += [(file, _GUARD_NAME) for file in self._files if file != self.path.name]
        for file, name in where:
            found, expected = checksum(self._files[file].tensor(name)), self._checksums[name]
            if found != expected:
                raise InputError(
                    f"{self.path.with_name(file)}: damaged: tensor {printable(name)} has checksum {found}, "
                    f"expected {expected}"
                )

    @property
    def assets(self) -> Mapping[str, bytes]:
        return LazyAssets({n.removeprefix(_ASSET_PREFIX): functools.partial(self._asset, n) for n in self._asset_names})

    def _asset(self, name: str) -> bytes:
        return self._stored(name).numpy().tobytes()

    def _stored(self, name: str) -> Tensor:
        return self._files[self._weight_map.get(name, self.path.name)].tensor(name)

    def stored_checksum(self, entry: str) -> str | None:
        return self._checksums.get(entry)

    def weight(self, name: str) -> Stored:
        quant = self.quantization.get(name)
        if quant is None:
            return self.tensor(name)
        shape = self.spec.projections()[name]
        parts = {part: self._stored(f"{name}.{part}") for part in quant.shapes(*shape)}
        return QuantizedWeight.from_parts(quant, shape, parts)

    def tensor(self, name: str) -> Tensor:
        if name not in self.quantization:
            return self._stored(name)
        return as_weight(self.weight(name)).dense(self.dtype)

    def checksums(self, on_tensor: Callable[[str], None] = lambda _: None) -> dict[str, str]:
        """Those of quantised weights are computed, since they count what the codes stand for."""
        found = {}
        for name in self.spec.tensor_shapes():
            found[name] = checksum(self.tensor(name)) if name in self.quantization else self._checksums[name]
            on_tensor(name)
        return found


class _Writer:
    """Writes one checkpoint, whole or in shards, a tensor at a time."""

    def __init__(self, path: Path, checkpoint: Checkpoint, on_tensor: Callable[[str], None]) -> None:
        self._path = path
        self._checkpoint = checkpoint
        self._on_tensor = on_tensor
        self._extra = {
            _ASSET_PREFIX + name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for name, data in sorted(checkpoint.assets.items())
            if data
        }
        self._extra[_GUARD_NAME] = torch.frombuffer(bytearray(_GUARD_TEXT), dtype=torch.uint8)[None]
        self._extra_entries = [TensorEntry(n, t.dtype, tuple(t.shape)) for n, t in self._extra.items()]
        groups = checkpoint.entries()
        self.weights = [entry for group in groups.values() for entry in group]
        self._weight_of = {entry.name: name for name, group in groups.items() for entry in group}

    def _tensor(self, name: str) -> Tensor:
        if name in self._extra:
            return self._extra[name]
        whole = self._weight_of[name]
        if whole == name:
            return self._checkpoint.tensor(name)
        return as_weight(self._checkpoint.weight(whole)).parts()[name.rpartition(".")[2]]

    def _done(self, entry: TensorEntry, found: str) -> None:
        if entry.name == _GUARD_NAME:
            return  # its number depends on that of the files
        expected = self._checkpoint.stored_checksum(entry.name)
        if expected not in (None, found):
            raise InputError(
                f"{self._checkpoint.name}: tensor {entry.name} has checksum {found}, expected {expected}: something "
                "wrote to the file since it was opened; try again when that has ended"
            )
        self._on_tensor(entry.name)

    def _metadata(self, checksums: Mapping[str, str], index: Mapping[str, Any]) -> Mapping[str, str]:
        content = {
            "format_version": FORMAT_VERSION,
            "dtype": DTYPE_NAMES[self._checkpoint.dtype],
            "spec": self._checkpoint.spec.to_json(),
            "plan": self._checkpoint.plan,
            "provenance": dict(self._checkpoint.provenance),
            "checksums": dict(checksums),
            **index,
        }
        if self._checkpoint.quantization:
            content["quantization"] = stored.quantization_to_json(self._checkpoint.quantization, self._checkpoint.spec)
        text = json.dumps(content, separators=(",", ":"))
        return {"format": FORMAT, FORMAT: text, "checksum": _metadata_checksum(text)}

    def check(self) -> None:
        """Refuse what could not be read again."""
        text = self._metadata({}, {})[FORMAT]
        try:
            Description.from_json(parse_object(text.encode(), "description"))
        except InputError as error:
            raise InputError(f"{self._checkpoint.name}: cannot be written: {error}") from error

    def shard(self, pending: PendingFile, weights: list[TensorEntry]) -> tuple[dict[str, str], str]:
        """One shard; the checksums of its tensors, and that of its header."""
        entries = [*weights, self._extra_entries[-1]]
        assert entries[-1].name == _GUARD_NAME

        def metadata(checksums: Mapping[str, str]) -> Mapping[str, str]:
            return {"format": shards.SHARD_FORMAT, "checksums": json.dumps(checksums, separators=(",", ":"))}

        found, header = write_entries(pending.file, entries, self._tensor, metadata, self._done)
        pending.complete()
        return {e.name: found[e.name] for e in weights}, header

    def head(
        self, pending: PendingFile, weights: list[TensorEntry], known: Mapping[str, str], index: Mapping[str, Any]
    ) -> None:
        """The file that users name. known: checksums of the tensors that lie elsewhere."""
        write_entries(
            pending.file,
            [*weights, *self._extra_entries],
            self._tensor,
            lambda checksums: self._metadata({**known, **checksums}, index),
            self._done,
        )
        pending.complete()


def write_native(
    path: Path,
    checkpoint: Checkpoint,
    on_tensor: Callable[[str], None] = lambda _: None,
    max_shard_size: int | str = shards.DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Write any `checkpoint` (dense import or pruned view), streamed: as one file, or, where its weights take more
    than `max_shard_size` (bytes, or text such as `5GB`), as a head at `path` and shards beside it.

    Nothing has a name before all of it is written; the head takes its name last, so that whoever stops the
    process at any moment finds at `path` what was there before, or the whole new checkpoint. on_tensor: called
    after each tensor of `Checkpoint.entries` and each asset. overwrite: let `path` replace a file that is there; a
    file that `checkpoint` is read from is never replaced.
    """
    limit = shards.parse_size(max_shard_size)
    writer = _Writer(path, checkpoint, on_tensor)
    writer.check()
    groups = [stored.aligned(group) for group in shards.split(writer.weights, limit)]
    check_output(path, checkpoint.source_files, overwrite, sum(e.nbytes for e in writer.weights))
    with atomic_files(path) as make:
        written: dict[str, PendingFile] = {}
        checksums: dict[str, str] = {}
        index: dict[str, Any] = {}
        if len(groups) > 1:
            index = {"shards": {}, "weight_map": {}}
            for number, group in enumerate(groups, 1):
                pending = make(f"{path.name}.{number}")
                found, header = writer.shard(pending, group)
                name = shards.shard_name(path, number, len(groups), header)
                written[name] = pending
                checksums |= found
                index["shards"][name] = header
                index["weight_map"] |= dict.fromkeys(found, name)
        head = make(path.name)
        writer.head(head, groups[0] if len(groups) == 1 else [], checksums, index)
        checkpoint.check_unchanged()
        with shards.publishing(path.parent):
            try:
                for name, pending in written.items():
                    pending.publish(path.with_name(name))
                head.publish(path, overwrite)
            finally:
                shards.remove_stale(path)
