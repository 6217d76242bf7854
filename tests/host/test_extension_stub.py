"""depthprune_runtime/_C.pyi says what the compiled extension has: the same names, arguments and order."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from built import built

_C = built()
STUB = ast.parse((Path(__file__).resolve().parent.parent.parent / "depthprune_runtime" / "_C.pyi").read_text())


def public(thing: Any) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_") or name == "__init__"}


def typed() -> dict[str, ast.FunctionDef]:
    """Functions and methods of the stub by their dotted names."""
    found = {}
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def test_the_names_are_those_of_the_extension() -> None:
    classes = {name for name in public(_C) if isinstance(getattr(_C, name), type)}
    compiled = {f"{name}.{method}" for name in classes for method in public(getattr(_C, name))}
    assert set(typed()) == public(_C) - classes | compiled


@pytest.mark.parametrize("name", sorted(typed()))
def test_arguments(name: str) -> None:
    """pybind11 writes a signature into each docstring; arguments without a name are arg0, arg1, ..."""
    thing: Any = _C
    for part in name.split("."):
        thing = getattr(thing, part)
    signature = thing.__doc__.splitlines()[0]
    compiled = [arg for arg in re.findall(r"[(,] ?(\w+):", signature) if arg != "self"]
    node = typed()[name]
    assert not node.args.kwonlyargs and not node.args.defaults, name
    if node.args.posonlyargs:
        assert compiled == [f"arg{i}" for i in range(len(node.args.posonlyargs) - 1)], signature
    else:
        assert compiled == [a.arg for a in node.args.args if a.arg != "self"], signature
