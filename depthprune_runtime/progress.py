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
