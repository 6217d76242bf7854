"""What a window needs to be trained on: the hidden states in front of what is trained, and the teacher's answers.

The sub-layers before the first edit are the teacher's own, and never change. So one pass of the teacher gives both:
what enters the student's first trained sub-layer, and the logits to come to. With a cache this happens once a window;
a record on disk holds them, with a checksum, so that a run that was killed finds what it had.

A record of S tokens: hidden states [S, C], the k kept tokens [S, k] int32 and their log-probabilities [S, k] float16,
and, where the student shall meet them, the teacher's last hidden states [S, C].
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from depthprune_runtime.checkpoint import Checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.healing.loss import kept_logprobs
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder

_LOGIT_ROWS = 128
_CHECKSUM_BYTES = 8


@dataclass(frozen=True)
class Target:
    """Of one window. states: entering the student's first trained sub-layer; ids, logprobs: what is kept of the
    teacher's distribution; last: its hidden states behind the last sub-layer, empty where nothing needs them."""

    states: Tensor  # [S, C]
    ids: Tensor  # [S, k] int32
    logprobs: Tensor  # [S, k] float16
    last: Tensor  # [S, C] or [0, C]


class Teacher:
    """The dense parent, window by window.

    Args:
        checkpoint: the parent.
        start: number of the student's first trained sub-layer; all before it are the parent's.
        device: where it runs, in the dtype of the checkpoint.
        top_k: tokens to keep.
        last: keep the last hidden states, too.
    """

    def __init__(self, checkpoint: Checkpoint, start: int, device: torch.device, top_k: int, last: bool) -> None:
        self._decoder = Decoder(checkpoint.spec, checkpoint.weight, device, checkpoint.dtype)
        self._start = start
        self._device = device
        self._top_k = top_k
        self._last = last

    @torch.no_grad()  # what inference mode makes cannot be saved for a gradient
    def __call__(self, window: Tensor) -> Target:  # [S] int64
        """Run one window, alone: its numbers do not depend on what runs beside it."""
        batch = packed([window.shape[0]], self._device)
        residual = self._decoder.embed(window.to(self._device))
        states, out = residual, None
        for i, sublayer in enumerate(self._decoder.sublayers):
            if i == self._start:
                states = residual.clone() if out is None else residual + out
            out = sublayer(residual, batch, None, out)
        last = residual + out if self._last and out is not None else residual[:0]
        hidden = self._decoder.final(residual, out)
        kept = [kept_logprobs(self._decoder.logits(rows), self._top_k) for rows in hidden.split(_LOGIT_ROWS)]
        ids, logprobs = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return Target(states.cpu(), ids.to(torch.int32).cpu(), logprobs.to(torch.float16).cpu(), last.cpu())


def _to_bytes(tensor: Tensor) -> bytes:
    values: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return bytes(values.data)


class Cache:
    """A file of records, one a window; those not written yet are holes.

    Args:
        path: the file, made if it is not there.
        windows: how many records there may be.
        like: shapes and dtypes of a record's tensors.
        key: what decides the run; records of another one are none.
    """

    def __init__(self, path: Path, windows: int, like: Target, key: Mapping[str, Any]) -> None:
        self._path = path
        self._like = like
        self._parts = [like.states, like.ids, like.logprobs, like.last]
        self._bytes = sum(part.nbytes for part in self._parts)
        self._windows = windows
        self._seed = xxhash.xxh3_64_intdigest(json.dumps(key, sort_keys=True).encode())
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    @staticmethod
    def check_room(folder: Path, windows: int, like: Target) -> None:
        """Refuse early what the disk of `folder` has no room for."""
        needed = windows * (_CHECKSUM_BYTES + sum(p.nbytes for p in (like.states, like.ids, like.logprobs, like.last)))
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{folder}: the teacher's answers take {needed:,} bytes, its disk has {free:,} free; choose another "
                "folder with --work, fewer tokens or a smaller top_k, or --no-cache"
            )

    def get(self, number: int) -> Target | None:
        """Record `number`; None where there is none, or none that is whole."""
        size = _CHECKSUM_BYTES + self._bytes
        data = bytearray(os.pread(self._file, size, number * size))  # tensors want memory that may be written
        content = memoryview(data)[_CHECKSUM_BYTES:]
        if len(content) < self._bytes or self._checksum(content) != data[:_CHECKSUM_BYTES]:
            return None
        found, first = [], _CHECKSUM_BYTES
        for part in self._parts:
            count, values = part.numel(), part
            if count:
                values = torch.frombuffer(data, dtype=part.dtype, count=count, offset=first).view(part.shape)
            found.append(values)
            first += part.nbytes
        return Target(*found)

    def put(self, number: int, target: Target) -> None:
        content = b"".join(map(_to_bytes, (target.states, target.ids, target.logprobs, target.last)))
        assert len(content) == self._bytes and 0 <= number < self._windows
        data = memoryview(self._checksum(content) + content)
        place = number * len(data)
        try:
            while data:  # the system may take a part of it
                written = os.pwrite(self._file, data, place)
                data, place = data[written:], place + written
        except OSError as error:
            hint = "; free some space, or give --no-cache" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise InputError(f"{self._path}: cannot be written: {error.strerror}{hint}") from error

    def _checksum(self, content: bytes | memoryview) -> bytes:
        return xxhash.xxh3_64(content, seed=self._seed).digest()

    def close(self) -> None:
        os.close(self._file)


class Targets:
    """Targets by the number of the window, from the cache or from the teacher.

    Args:
        windows: all windows [N, S].
        teacher: asked where the cache has none.
        cache: None computes every target anew.
    """

    def __init__(self, windows: Tensor, teacher: Teacher, cache: Cache | None) -> None:
        self._windows = windows
        self._teacher: Teacher | None = teacher
        self._cache = cache

    def __getitem__(self, number: int) -> Target:
        found = None if self._cache is None else self._cache.get(number)
        if found is not None:
            return found
        assert self._teacher is not None
        made = self._teacher(self._windows[number])
        if self._cache is not None:
            self._cache.put(number, made)
        return made

    def all_cached(self) -> None:
        """Every target that is still to come is in the cache: the teacher's memory is free again."""
        if self._cache is not None:
            self._teacher = None


def example(spec_width: int, seq_len: int, top_k: int, dtype: torch.dtype, last: bool) -> Target:
    """A target without contents, for sizes."""
    return Target(
        torch.empty(seq_len, spec_width, dtype=dtype),
        torch.empty(seq_len, top_k, dtype=torch.int32),
        torch.empty(seq_len, top_k, dtype=torch.float16),
        torch.empty(seq_len if last else 0, spec_width, dtype=dtype),
    )


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))
