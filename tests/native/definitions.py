"""What the sources of the extension define with external linkage, by a reading that needs no compiler.

Two definitions of one name in different files break C++'s one-definition rule: the linker keeps either, silently, where
one of them is inline.
"""

from __future__ import annotations

import re
from pathlib import Path

_NOISE = re.compile(
    r"//[^\n]*|/\*.*?\*/|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", re.S | re.M
)
_ATTRIBUTES = re.compile(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)|\bDEPTHPRUNE_\w+|\[\[[^\]]*\]\]")
_NAMESPACE = re.compile(r"(?:inline\s+)?namespace\b\s*([\w:]*)\s*$")
_TYPE = re.compile(r"\b(?:struct|class|union|enum(?:\s+class)?)\s+(?:alignas\s*\([^)]*\)\s*)?(\w+)[^()=]*$")
_FUNCTION = re.compile(r"([\w:~]+|operator\s*\S+?)\s*\(")


def _scopes(text: str) -> list[tuple[str, str]]:
    """(namespace, what stands before the brace) of every braced thing in a named namespace or in none."""
    found = []
    stack: list[str | None] = []  # names of namespaces; None: any other brace
    start = 0
    for match in re.finditer(r"[{};]", text):
        before = " ".join(text[start : match.start()].split())
        start = match.end()
        if match[0] == "}":
            if stack:
                stack.pop()
            continue
        if match[0] == ";":
            continue
        named = _NAMESPACE.search(before)
        outside = all(name is not None for name in stack)
        if named is not None and outside:
            stack.append(named[1] or "(anonymous)")
            continue
        if outside and "(anonymous)" not in stack:
            found.append(("::".join(name for name in stack if name), before))
        stack.append(None)
    return found


def _parameters(text: str) -> tuple[str, ...]:
    """Types of a parameter list that begins after its parenthesis."""
    parts, depth, part = [], 0, ""
    for char in text:
        if char == ")" and depth == 0:
            break
        depth += (char in "(<") - (char in ")>")
        if char == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += char
    parts.append(part)
    kinds = (re.sub(r"=.*", "", part).strip() for part in parts)
    return tuple(re.sub(r"(?<=[\w&*>\]])\s*\b\w+$", "", kind) if " " in kind else kind for kind in kinds if kind)


def definitions(path: Path) -> set[str]:
    """Functions, with the types of their parameters, and types that `path` defines outside anonymous namespaces."""
    text = _ATTRIBUTES.sub(" ", _NOISE.sub(" ", path.read_text()))
    found = set()
    for namespace, before in _scopes(text):
        template = re.sub(r"^template\s*<[^{};]*?>\s*(?=[\w:]+[\s&*])", "", before)
        kind = _TYPE.search(template)
        if kind is not None and "(" not in template:
            found.add(f"{namespace}::{kind[1]}")
            continue
        function = _FUNCTION.search(template)
        if function is None or "=" in template[: function.start()] or re.search(r"\bstatic\b", template):
            continue
        if function[1].isupper() or re.fullmatch(r"[A-Z_0-9]+", function[1]):
            continue  # a macro, such as TORCH_LIBRARY_IMPL
        types = ", ".join(_parameters(template[function.end() :]))
        found.add(f"{namespace}::{function[1]}({types})")
    return found


def clashes(paths: list[Path]) -> dict[str, list[Path]]:
    """Names that more than one file defines."""
    homes: dict[str, list[Path]] = {}
    for path in paths:
        for name in definitions(path):
            homes.setdefault(name, []).append(path)
    return {name: files for name, files in homes.items() if len(files) > 1}
