"""What the package exports is typed and documented: every argument, every result, every refusal."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import depthprune_runtime

RAISES_NOTHING = {"AsyncEngine.drop", "RepairOptions.suited"}
_SELF = ("self", "cls")


def functions(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods and properties that `cls` itself defines."""
    for name, value in vars(cls).items():
        if not name.startswith("_"):
            function = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
            if inspect.isfunction(function):
                yield name, function


def exported() -> dict[str, Any]:
    names = [n for n in depthprune_runtime.__all__ if not n.startswith("__")]
    return {name: getattr(depthprune_runtime, name) for name in names}


def callables() -> dict[str, Callable[..., Any]]:
    found = {}
    for name, value in exported().items():
        if inspect.isclass(value):
            found |= {f"{name}.{method}": function for method, function in functions(value)}
        else:
            found[name] = value
    return found


def section(doc: str, title: str) -> str | None:
    """The indented lines below `title`, without their common indent."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)+)", inspect.cleandoc(doc) + "\n", re.MULTILINE)
    return None if found is None else inspect.cleandoc("\n" + found[1])


def documented(doc: str, title: str) -> list[str]:
    """Names that a section explains, one an entry."""
    return re.findall(r"^\*{0,2}(\w+): \S", section(doc, title) or "", re.MULTILINE)


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name not in _SELF]


def faults_of_types(function: Callable[..., Any]) -> list[str]:
    types = typing.get_type_hints(inspect.unwrap(function))
    faults = [f"{p.name}: not annotated" for p in parameters(function) if p.name not in types]
    faults += [
        f"{p.name}: any keyword is taken"
        for p in parameters(function)
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and types.get(p.name) in (Any, object)
    ]
    return faults + ([] if "return" in types else ["result: not annotated"])


def faults_of_text(name: str, function: Callable[..., Any]) -> list[str]:
    doc, given = function.__doc__ or "", [p.name for p in parameters(function)]
    faults = [] if doc else ["no docstring"]
    if given:
        if documented(doc, "Args") != given:
            faults.append(f"Args: explains {documented(doc, 'Args')}, takes {given}")
        if typing.get_type_hints(inspect.unwrap(function)).get("return") is not type(None) and not section(
            doc, "Returns"
        ):
            faults.append("no Returns")
        if not section(doc, "Raises") and name not in RAISES_NOTHING:
            faults.append("no Raises")
    return faults


def faults_of_class(cls: type) -> list[str]:
    """Of a constructor, which its class documents; a dataclass names its fields in any form."""
    doc = cls.__doc__ or ""
    if issubclass(cls, Exception):
        return [] if doc else ["no docstring"]
    if dataclasses.is_dataclass(cls):
        return [f"{f.name}: not explained" for f in dataclasses.fields(cls) if not re.search(rf"\b{f.name}\b", doc)]
    given, explained = [p.name for p in parameters(cls.__init__)], documented(doc, "Args")
    faults = [] if explained == given else [f"Args: explains {explained}, takes {given}"]
    return faults_of_types(cls.__init__) + faults


@pytest.mark.parametrize(("name", "function"), callables().items(), ids=callables())
def test_functions_are_typed_and_documented(name, function):
    assert faults_of_types(function) + faults_of_text(name, function) == []


@pytest.mark.parametrize("name", [n for n, value in exported().items() if inspect.isclass(value)])
def test_classes_are_documented(name):
    assert faults_of_class(exported()[name]) == []


def test_exceptions_of_the_rules_exist():
    assert set(callables()) >= RAISES_NOTHING


def test_faults_are_found():
    def bare(a, *rest: Any, b: int = 1, **options: Any):
        pass

    def good(a: int, **options: int) -> int:
        """Add.

        Args:
            a: the first
                of them.
            **options: the others.

        Returns:
            The sum.

        Raises:
            InputError: never.
        """
        return a

    assert faults_of_types(bare) == [
        "a: not annotated",
        "rest: any keyword is taken",
        "options: any keyword is taken",
        "result: not annotated",
    ]
    assert faults_of_text("bare", bare) == [
        "no docstring",
        "Args: explains [], takes ['a', 'rest', 'b', 'options']",
        "no Returns",
        "no Raises",
    ]
    assert faults_of_types(good) + faults_of_text("good", good) == []
    good.__doc__ = good.__doc__.replace("**options", "**others")
    assert faults_of_text("good", good) == ["Args: explains ['a', 'others'], takes ['a', 'options']"]
