"""Files whose tensors are mapped into memory, watched: what another process changes is noticed before it is used.

A mapped file that shrinks ends the process with SIGBUS as soon as a lost page is read. So size and time of the file
are compared before every tensor is handed out. What remains is a race: a file that shrinks while a tensor of it is
being read. A file that is replaced by another one of its name does no harm: the mapping keeps the old one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from depthprune_runtime.checkpoint.gate import reading
from depthprune_runtime.errors import InputError, printable


class WatchedFile:
    """A file as it was when this was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            self._then = path.stat()

    def check_unchanged(self) -> None:
        """Raises InputError if the file was written to since then."""
        then = self._then
        try:
            now = self.path.stat()
        except OSError:
            return  # removed or moved: a mapping of it stays whole
        if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
            return
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise InputError(
                f"{printable(self.path, 1000)}: something wrote to it since it was opened, when it had "
                f"{then.st_size:,} bytes (now {now.st_size:,}); try again when that has ended"
            )


class MappedFile(WatchedFile):
    """A safetensors file, mapped until nobody holds it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with reading(path):
            self._file: Any = safe_open(path, "pt")
        self.check_unchanged()

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, mapped."""
        self.check_unchanged()
        with reading(self.path):
            tensor: Tensor = self._file.get_tensor(name)
        return tensor
