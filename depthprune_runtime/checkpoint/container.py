"""The container: safetensors files written in a stream, with a checksum for every tensor.

Source of the format: the safetensors README (8-byte little-endian header length, JSON header, data).
Files are written under a temporary identity and take their names when whole, so that a reader never meets
half a file. Checksums are XXH3-64 over dtype, shape and bytes: they run at memory speed, so every load
verifies them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from depthprune_runtime.checkpoint.gate import parse_object, reading
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.spec import Shape

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_EMPTY_CHECKSUM = "0" * 16
_ALIGNMENT = 64  # bytes; mapped weights then start on a cache line and on a SIMD register
_MAX_HEADER = 1 << 28
_MAX_AXES = 16


@dataclass(frozen=True)
class TensorEntry:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _raw_bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def checksum(tensor: Tensor) -> str:
    """16 hex digits over dtype, shape and contents of a CPU `tensor`."""
    digest = xxhash.xxh3_64(f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}".encode())
    digest.update(_raw_bytes(tensor))
    return digest.hexdigest()


@contextlib.contextmanager
def _nameless_file(folder: Path) -> Iterator[BinaryIO | None]:
    """A file without a name, which vanishes even under SIGKILL; None where the system has none."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except (AttributeError, OSError):
        yield None
        return
    with os.fdopen(descriptor, "w+b") as file:
        yield file


class PendingFile:
    """An open file that has no name yet, or on some systems a temporary one. `atomic_files` makes them."""

    def __init__(self, near: Path, stack: contextlib.ExitStack) -> None:
        self._temporary = near.parent / f".{near.name}.{os.getpid()}.tmp"
        stack.callback(self._discard)
        nameless = stack.enter_context(_nameless_file(near.parent))
        self._nameless = nameless is not None
        self.file: BinaryIO = nameless if nameless is not None else stack.enter_context(self._temporary.open("w+b"))

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def complete(self) -> None:
        """Flush to the disk what was written; nothing more follows."""
        self.file.flush()
        os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def visible(self) -> Iterator[Path]:
        """A path under which the file can be read before it has a name, while the body runs."""
        yield Path(f"/proc/self/fd/{self.file.fileno()}") if self._nameless else self._temporary

    def publish(self, path: Path, overwrite: bool = True) -> None:
        """Give the file the name `path` in the same folder; overwrite: in place of whatever has it by now.

        Raises InputError if something has that name and must not be replaced.
        """
        if self._nameless:
            self._temporary.unlink(missing_ok=True)
            descriptor = self.file.fileno()
            # a descriptor argument makes CPython call linkat, which follows the link; link would not
            os.link(f"/proc/self/fd/{descriptor}", self._temporary, src_dir_fd=descriptor, follow_symlinks=True)
        if overwrite:
            self._temporary.replace(path)
            return
        try:
            os.link(self._temporary, path)  # unlike a renaming, it never replaces
        except FileExistsError as error:
            raise InputError(
                f"output {path}: another process made it meanwhile; choose another name, or let it be replaced with "
                "--force (overwrite=True)"
            ) from error
        except OSError:  # a file system without hard links
            if path.exists():
                raise InputError(f"output {path}: another process made it meanwhile; choose another name") from None
            self._temporary.replace(path)
        self._discard()


@contextlib.contextmanager
def atomic_files(path: Path) -> Iterator[Callable[[str], PendingFile]]:
    """A maker of files in the folder of `path`, each to be published by the body; of the others nothing is left.

    The maker takes a name that tells the files apart. An OSError in the body becomes an InputError.
    """
    try:
        with contextlib.ExitStack() as stack:
            yield lambda name: PendingFile(path.with_name(name), stack)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; free some space or choose another disk" if full else ""
        raise InputError(f"output {path}: cannot be written: {error.strerror or error}{hint}") from error


@contextlib.contextmanager
def atomic_file(path: Path, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` only when the body ends well; else nothing is left.

    overwrite: in place of whatever has that name by then.
    """
    with atomic_files(path) as make:
        pending = make(path.name)
        yield pending.file
        pending.complete()
        pending.publish(path, overwrite)


def _header(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        table[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    padding = -(8 + len(text)) % _ALIGNMENT
    text += b" " * padding
    return len(text).to_bytes(8, "little") + text


def write_entries(
    file: BinaryIO,
    entries: list[TensorEntry],
    tensor: Callable[[str], Tensor],
    metadata: Callable[[Mapping[str, str]], Mapping[str, str]],
    on_tensor: Callable[[TensorEntry, str], None] = lambda *_: None,
) -> tuple[dict[str, str], str]:
    """Write `entries` in order into `file`, holding one tensor at a time.

    `metadata(checksums)` gives the string metadata from name -> checksum; it is called twice, before
    and after the data, and must have the same length both times. `on_tensor` is called after each one,
    with its checksum.
    Returns the checksums, and the checksum of the header.
    """
    first = _header(entries, metadata({e.name: _EMPTY_CHECKSUM for e in entries}))
    checksums: dict[str, str] = {}
    file.write(first)
    for entry in entries:
        data = tensor(entry.name).detach().to("cpu")
        if (data.dtype, tuple(data.shape)) != (entry.dtype, entry.shape):
            raise AssertionError(f"{entry.name}: {data.dtype} {tuple(data.shape)} is not {entry}")
        checksums[entry.name] = checksum(data)
        file.write(_raw_bytes(data))
        on_tensor(entry, checksums[entry.name])
    last = _header(entries, metadata(checksums))
    assert len(last) == len(first)
    file.seek(0)
    file.write(last)
    return checksums, header_checksum(last)


def header_checksum(header: bytes) -> str:
    """32 hex digits over a file's header, its length included."""
    return xxhash.xxh3_128(header).hexdigest()


def _check_entry(name: str, entry: Any) -> tuple[int, int]:
    """(first byte, end) of one tensor, after its dtype, shape and offsets have been found to agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"tensor {printable(name)}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    good = isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not good or not all(type(n) is int and n >= 0 for n in [*shape, *offsets]) or len(shape) > _MAX_AXES:
        raise InputError(f"tensor {printable(name)}: expected a dtype, a shape and two offsets, got {printable(entry)}")
    first, end = offsets
    known = DTYPES.get(dtype)
    if end < first or (known is not None and math.prod(shape) * known.itemsize != end - first):
        raise InputError(f"tensor {printable(name)} of shape {printable(shape)} claims {end - first} bytes")
    return first, end


def _check_header(header: Mapping[str, Any]) -> int:
    """Bytes of data that `header` describes: tensor behind tensor, without holes and overlaps."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("its metadata: expected texts")
    ranges = {name: _check_entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if first != end:
            raise InputError(f"tensor {printable(name)} begins at byte {first}, expected {end}")
        end = last
    return end


def read_header(path: Path, expected_checksum: str | None = None) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked against the file's size and, if given, a checksum.

    Every entry has a `dtype` (a text), a `shape` and `data_offsets` that agree; the tensors fill the file.
    """
    name = printable(path, 1000)
    with reading(path):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
                raise InputError(
                    f"{name}: truncated or not a safetensors file: {size} bytes, its header claims {length} bytes"
                )
            text = file.read(length)
        if expected_checksum is not None and header_checksum(prefix + text) != expected_checksum:
            raise InputError(f"{name}: damaged, or a shard of another checkpoint: its header is not the expected one")
        try:
            header = parse_object(text, "its header")
            end = _check_header(header)
        except InputError as error:
            raise InputError(f"{name}: damaged or not a safetensors file: {error}") from error
        expected = 8 + length + end
        if size != expected:
            raise InputError(f"{name}: truncated or damaged: expected {expected} bytes by its header, got {size}")
    return header
