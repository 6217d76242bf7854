"""Several files for one checkpoint: how the tensors are cut, how the files are called, what may be removed.

A checkpoint above `max_shard_size` is a head and its shards, all in one folder:

    pruned.safetensors                                    the head: description, tokenizer, index of the shards
    pruned-00001-of-00002-3c4d8b6a90c1f7e2.safetensors    a shard: tensors in order, and a checksum of each
    pruned-00002-of-00002-91b0a6d25e7f4c38.safetensors

The head is what users name. Its index is that of Hugging Face (`weight_map`: tensor -> file), but lies in the
head's metadata, so that no stock loader follows it. The last part of a shard's name is a checksum of its header,
which holds those of its tensors: shards of different contents never share a name. So new shards stand beside
those of an older checkpoint of the same name, until the new head takes the old one's place in one step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from depthprune_runtime.checkpoint.container import TensorEntry
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.host.sizes import size_in_bytes

DEFAULT_MAX_SHARD_SIZE = 5_000_000_000  # bytes of weights in a file, as in Transformers
SHARD_FORMAT = "depthprune-shard"
MAX_SHARDS = 500  # all are open at once until they are published
_MAX_HEAD = 1 << 28


def parse_size(value: int | str) -> int:
    """`max_shard_size` in bytes, from a number of them or from text such as `5GB` or `500MiB`."""
    size = size_in_bytes(value) if isinstance(value, str) else value
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        shown = printable(repr(value))
        raise InputError(f"max_shard_size: expected bytes, or a size such as 5GB or 500MiB, got {shown}")
    return size


def split(entries: Iterable[TensorEntry], max_shard_size: int) -> list[list[TensorEntry]]:
    """Cut `entries`, in order, into shards of at most `max_shard_size` bytes; a larger tensor has its own."""
    groups: list[list[TensorEntry]] = []
    size = 0
    for entry in entries:
        if not groups or size + entry.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) > MAX_SHARDS:
        raise InputError(
            f"max_shard_size: {max_shard_size} bytes would make {len(groups)} shards, expected at most {MAX_SHARDS}; "
            "allow larger ones"
        )
    return groups


def _stem(path: Path) -> str:
    return path.name.removesuffix(".safetensors")


def shard_name(path: Path, number: int, count: int, header_checksum: str) -> str:
    """Name of shard `number` (from 1) of the checkpoint whose head is `path`."""
    return f"{_stem(path)}-{number:05}-of-{count:05}-{header_checksum[:16]}.safetensors"


def _shards_of(file: Path) -> set[str]:
    """Names of the shards that `file` refers to; none if it is no head."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if length <= min(file.stat().st_size, _MAX_HEAD) else b""
        if b"weight_map" in text:
            content: dict[str, Any] = json.loads(json.loads(text)["__metadata__"]["depthprune"])
            return {name for name in content["shards"] if isinstance(name, str)}
    return set()


def remove_stale(path: Path) -> None:
    """Remove shards made for a head called `path` that no head in the folder refers to any more.

    They are those of a checkpoint that was replaced, or of a writer that was killed while it published them.
    """
    mine = re.compile(re.escape(_stem(path)) + r"-\d{5}-of-\d{5}-[0-9a-f]{16}\.safetensors")
    with contextlib.suppress(OSError):
        files = [p for p in path.parent.iterdir() if p.is_file()]
        candidates = {p.name for p in files if mine.fullmatch(p.name)}
        if candidates:
            for file in files:
                candidates -= _shards_of(file)
        for name in candidates:
            path.with_name(name).unlink(missing_ok=True)


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """Lock `folder` against other writers of this package while the body runs.

    Without locks of files on this system or disk, nothing is locked.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)  # gives the lock back, too
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
