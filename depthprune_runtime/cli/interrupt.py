"""What a command had written when it was interrupted."""

from __future__ import annotations

import argparse
from pathlib import Path

_WRITTEN = ("output", "state", "plot")  # arguments that name what a command writes

Stamp = tuple[int, int, int] | None


def _stamp(path: str) -> Stamp:
    """What changes when `path` is written; None where nothing is."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class Written:
    """Remembers what was there before a command, to say afterwards what it wrote."""

    def __init__(self, args: argparse.Namespace) -> None:
        paths = {name: getattr(args, name, None) for name in _WRITTEN}
        self._done, self._again = "search", "the same command"
        if "work" in args:  # of a training, which keeps its state in a folder
            folder = args.work or f"{args.output}.heal"
            paths["state"] = str(Path(folder) / "state.pt")
            self._done, self._again = "training", "the same command with --resume"
        self._paths = {name: path for name, path in paths.items() if path is not None}
        self._before = {name: _stamp(path) for name, path in self._paths.items()}

    def report(self) -> str:
        """One clause for the message of an interrupt."""
        found = {name: path for name, path in self._paths.items() if _stamp(path) not in (None, self._before[name])}
        state = found.pop("state", None)
        if found:
            return f"{' and '.join(found.values())} was already written"
        if state is not None:
            return f"no model was written; the {self._done} so far is in {state}, and {self._again} goes on from there"
        return "nothing was written"
