"""`StopStrings`: finds the strings that end an output in text that comes in pieces. Imports no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

MAX_STOP_STRINGS = 256
MAX_STOP_CHARACTERS = 4096  # of all stop strings of a request together

_CHARACTER_BITS = 21  # of a Unicode code point


class Match(NamedTuple):
    """A stop string in a text. start: of its first character, from the start of the piece, negative if before it."""

    start: int
    stop: str


class StopStrings:
    """The automaton of Aho and Corasick (1975): what a character costs does not depend on the number of stop strings.

    Its state is the longest end of the text that begins some stop string; that is the text that must be held back.
    Requests may share one, each with a state of its own; 0 is the first.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._next: dict[int, int] = {}  # state and character -> state
        self._fallback = [0]  # state -> that of its next shorter end which begins a stop string
        self._length = [0]  # state -> characters of the text that it stands for
        self._found: list[str | None] = [None]  # state -> longest stop string that ends there
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            key = state << _CHARACTER_BITS | ord(character)
            following = self._next.get(key)
            if following is None:
                following = self._next[key] = len(self._length)
                self._length.append(self._length[state] + 1)
                self._fallback.append(0)
                self._found.append(None)
            state = following
        self._found[state] = stop

    def _link(self) -> None:
        """Set every state's fallback, shorter texts first."""
        edges: list[list[tuple[int, int]]] = [[] for _ in self._length]
        for key, following in self._next.items():
            edges[key >> _CHARACTER_BITS].append((key & (1 << _CHARACTER_BITS) - 1, following))
        waiting = deque([0])
        while waiting:
            state = waiting.popleft()
            for character, following in edges[state]:
                if state:
                    self._fallback[following] = self._step(self._fallback[state], character)
                if self._found[following] is None:
                    self._found[following] = self._found[self._fallback[following]]
                waiting.append(following)

    def _step(self, state: int, character: int) -> int:
        while True:
            following = self._next.get(state << _CHARACTER_BITS | character)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._fallback[state]

    def scan(self, state: int, piece: str) -> tuple[int, Match | None]:
        """Read one more piece: the new state, and the stop string that begins first of those that end in the piece.

        Of several that begin there, it is the shortest.
        """
        best: Match | None = None
        for end, character in enumerate(piece, 1):
            state = self._step(state, ord(character))
            stop = self._found[state]
            if stop is not None and (best is None or end - len(stop) < best.start):
                best = Match(end - len(stop), stop)
        return state, best

    def held(self, state: int) -> int:
        """How many last characters of the text may be the beginning of a stop string."""
        return self._length[state]
