"""Where a job may write: never onto a file that it reads, and onto another one only if the caller says so.

All of it is checked before a long job, and once more by the system when the finished file takes its name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from depthprune_runtime.errors import InputError, printable

# Ends of names that promise another format than ours. A name without an end, or with an unknown one, is fine.
_OTHER_FORMATS = (".gguf", ".ggml", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npz", ".h5", ".json")
_LOADED_NAME = "model.safetensors"  # what loaders take from a folder before they look for shards


def as_path(value: object, what: str) -> Path:
    """A path that a caller gave. Raises InputError for another kind of value."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise InputError(f"{what}: expected a path, got {printable(repr(value))}")
    return Path(value)


def _same(path: Path, other: Path) -> bool:
    """Whether both name one file: through links, and on file systems that do not tell upper from lower case."""
    with contextlib.suppress(OSError):
        return path.samefile(other)
    # names of two files to come must differ in more than case
    to_come = not path.exists() and not other.exists()
    return to_come and str(path.resolve()).casefold() == str(other.resolve()).casefold()


def _replaced(path: Path, sources: Iterable[Path]) -> Path | None:
    """The file of `sources`, files and folders, that writing `path` would replace."""
    for source in sources:
        if _same(path, source):
            return source
        if not source.is_dir():
            continue
        folder = source.resolve()
        if path.exists():
            if folder in path.resolve().parents:
                return path
            # files of a folder may be links, as in the hub's cache
            found = next((file for file in source.iterdir() if _same(path, file)), None)
            if found is not None:
                return found
        elif path.resolve().parent == folder and path.name.casefold() == _LOADED_NAME:
            return path
    return None


def check_destination(path: Path, sources: Iterable[Path] = (), overwrite: bool = False, nbytes: int = 0) -> None:
    """Refuse early, before a long job, an output path that cannot or must not be written.

    Args:
        path: what will be written.
        sources: files and folders that the job reads. Nothing in them is ever replaced.
        overwrite: let `path` replace a file that is there. A link is never replaced.
        nbytes: how large the file will be.

    Raises:
        InputError: in one line that says what to do.
    """
    name = f"output {printable(path, 1000)}"
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # unlike exists, it says that no file can have this name
        replaced = _replaced(path, sources)
        if replaced is not None:
            raise InputError(
                f"{name}: would replace or hide {printable(replaced, 1000)}, which this job reads; choose another name"
            )
        if path.is_symlink():
            raise InputError(f"{name}: is a link to {printable(path.readlink(), 1000)}; give the name of a file")
        if path.exists() and not path.is_file():
            raise InputError(f"{name}: expected a regular file or a new name, got something else of that name")
        if path.exists() and not overwrite:
            raise InputError(
                f"{name}: is there already; choose another name, or let it be replaced with --force (overwrite=True)"
            )
        folder = path.parent
        if not folder.is_dir():
            raise InputError(f"{name}: its folder {printable(folder, 1000)} does not exist; create it first")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{name}: its folder {printable(folder, 1000)} is not writable")
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:  # a name that is too long, a zero byte in it
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if nbytes > free:
        raise InputError(f"{name}: needs {nbytes:,} bytes, its disk has {free:,} free")


def _check_replaced_folder(path: Path, sources: Iterable[Path], overwrite: bool, name: str) -> None:
    """Refuse to write over the folder `path` where it is no model's, or holds what the job reads."""
    inside = {path.resolve(), *(file.resolve() for file in path.iterdir())}
    read = {place for source in sources for place in (source.resolve(), *source.resolve().parents)}
    if inside & read:
        raise InputError(f"{name}: holds what this job reads; choose another name")
    if next(path.iterdir(), None) is None:
        return
    if not (path / "config.json").is_file():
        raise InputError(f"{name}: is a folder, but not of a model; choose another name")
    if not overwrite:
        raise InputError(
            f"{name}: is there already; choose another name, or let it be replaced with --force (overwrite=True)"
        )


def check_folder(path: Path, sources: Iterable[Path] = (), overwrite: bool = False, nbytes: int = 0) -> None:
    """`check_destination` of a folder: a new name, an empty folder or, with `overwrite`, that of a model."""
    name = f"output {printable(path, 1000)}"
    place = path
    try:
        if path.is_dir() and not path.is_symlink():
            _check_replaced_folder(path, sources, overwrite, name)
            place = path.resolve()
            place = place.with_name(f".{place.name}.tmp")  # its folder must be writable
        elif path.is_file() and not path.is_symlink():
            raise InputError(f"{name}: expected a folder or a new name, got a file of that name")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    check_destination(place, () if place is not path else sources, False, nbytes)


def check_output(path: Path, sources: Iterable[Path] = (), overwrite: bool = False, nbytes: int = 0) -> None:
    """`check_destination` of a model's file, whose name must not promise another format."""
    if path.suffix.lower() in _OTHER_FORMATS:
        raise InputError(
            f"output {printable(path, 1000)}: written is a file of our own, not {path.suffix}; "
            "give a name that ends in .safetensors"
        )
    check_destination(path, sources, overwrite, nbytes)
