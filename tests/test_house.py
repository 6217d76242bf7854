"""Nothing imports in a circle, no file is too long to be read at once, and what is no test stands with the helpers."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
LONGEST = 350  # lines
# Folder -> package that its modules are imported from; "" is a folder on the path.
IMPORTED = {
    "depthprune_runtime": "depthprune_runtime",
    "kernels": "depthprune_runtime.kernels",
    "benchmarks": "",
    "tests/fuzz": "fuzz",
    "tests/helpers": "",
    "tests/native": "",
}


def files(folder: Path) -> list[Path]:
    """Python files under `folder`; kernels/ is not found again through its link."""
    linked = ROOT / "depthprune_runtime" / "kernels"
    found = sorted(folder.rglob("*.py"))
    return [p for p in found if linked not in p.parents and not any(s[0] == "." for s in p.relative_to(folder).parts)]


def modules(folder: Path, package: str) -> dict[str, Path]:
    """Name -> file; a package is its __init__.py."""
    found = {}
    for path in files(folder):
        parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
        found[".".join(p for p in parts if p not in ("", "__init__"))] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All below `node` but what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from statements(child)


def dependencies(name: str, known: dict[str, Path]) -> set[str]:
    """The known modules that `name` imports, also inside functions: a late import hides a circle, it does not open it.

    Whoever imports a module of a package runs the package's __init__.py, unless it is part of the package itself.
    """
    found = set()
    for node in statements(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{a.name}" for a in node.names}
            wanted = {n if n in known else str(node.module) for n in names}
        else:
            continue
        for one in wanted:
            parts = one.split(".")
            above = {".".join(parts[:i]) for i in range(1, len(parts))}
            found |= {one} | {p for p in above if name != p and not name.startswith(f"{p}.")}
    return found & set(known) - {name}


def circle(known: dict[str, Path]) -> list[str]:
    """Modules that import each other, the first again at the end; empty where there are none."""
    try:
        graphlib.TopologicalSorter({name: dependencies(name, known) for name in known}).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_imports_in_a_circle():
    known = {
        name: path for folder, package in IMPORTED.items() for name, path in modules(ROOT / folder, package).items()
    }
    assert {"depthprune_runtime.kernels.launch", "report.rows", "pico", "fuzz.campaign"} <= set(known)
    assert " -> ".join(circle(known)) == ""


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "import b", "b": "from c import x", "c": ""}, set()),
        ({"a": "import b", "b": "from c import x", "c": "import a"}, {"a", "b", "c"}),
        ({"a": "def f():\n    import b", "b": "import a"}, {"a", "b"}),
        ({"a": "if TYPE_CHECKING:\n    import b", "b": "import a"}, set()),
        ({"p/__init__": "from p.a import x", "p/a": "from p import b", "p/b": ""}, set()),
        ({"p/__init__": "import p.a", "p/a": "", "p/b": "import c", "c": "import p.b"}, {"p.b", "c"}),
        ({"p/__init__": "import c", "p/a": "", "c": "import p.a"}, {"p", "c"}),
    ],
)
def test_a_circle_is_found(tmp_path, sources, found):
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(source)
    assert set(circle(modules(tmp_path, ""))) == found


def test_no_file_is_too_long():
    folders = ("depthprune_runtime", "kernels", "benchmarks", "examples", "tests")
    paths = [path for folder in folders for path in files(ROOT / folder)] + [ROOT / "setup.py"]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in paths}
    assert len(lengths) > 300
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_what_is_no_test_is_a_helper():
    """But for tools of one folder's tests, and scripts that are tests in a process of their own."""
    for path in files(TESTS):
        place = path.relative_to(TESTS)
        if place.parts[0] not in ("helpers", "native", "fuzz"):
            assert path.name.startswith(("test_", "interpret_")) or path.name == "conftest.py", place


def test_tests_mirror_the_package():
    own = {"benchmarks", "fuzz", "gpu", "helpers", "kernels", "native"}
    rooms = {p.name for p in (ROOT / "depthprune_runtime").iterdir() if p.is_dir()}
    assert {path.relative_to(TESTS).parts[0] for path in files(TESTS) if path.parent != TESTS} <= own | rooms
