"""The argument parser of all commands: one line for a usage error, and a guess at what was meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from depthprune_runtime.errors import printable


class Parser(argparse.ArgumentParser):
    """Names an unknown option first: argparse would complain of what is missing because of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message, 1000)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        for arg in args or ():
            if arg == "--" or (self._subparsers is not None and not arg.startswith("-")):
                break  # what follows is not for this parser
            name = arg.partition("=")[0]
            # a text with spaces is a value, as for argparse
            if name.startswith("--") and " " not in arg and not self._known(name):
                self.error(f"unknown option {name}{self._guess(name)}")
        return super().parse_known_args(args, namespace)

    def _known(self, name: str) -> bool:
        return any(option.startswith(name) for option in self._option_string_actions)

    def _guess(self, name: str) -> str:
        found = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f"; did you mean {found[0]}?" if found else ""
