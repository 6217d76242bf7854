"""Progress of long jobs: bars on stderr, or nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

Advance = Callable[[], None]


class Progress:
    """Opens one bar a stage; `Progress(False)` is silent, as libraries should be."""

    def __init__(self, visible: bool = False) -> None:
        self._visible = visible

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """A bar of `total` steps; the body calls the yielded function once a step."""
        with tqdm(
            total=total, desc=name, file=sys.stderr, disable=not self._visible, leave=False, mininterval=0.2
        ) as bar:

            def advance() -> None:
                bar.update()

            yield advance

    @contextlib.contextmanager
    def reported(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        """A bar that starts at `done`; the body calls the yielded function with a line about each step."""
        with tqdm(
            total=total,
            initial=done,
            desc=name,
            file=sys.stderr,
            disable=not self._visible,
            leave=False,
            mininterval=0.2,
        ) as bar:

            def report(line: str) -> None:
                bar.set_postfix_str(line, refresh=False)
                bar.update()

            yield report
