"""README, docs and their kin: links and anchors lead somewhere, every page is in the site, sentences stay short."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import depthprune_runtime
from depthprune_runtime.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *PAGES]
NOT_THERE = ("gpu.csv", "quality_rows.csv")  # rows that benchmarks will write
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))


def without_code(text: str) -> str:
    """Markdown without fenced code and HTML comments."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Anchors of its headings, which GitHub and the site make alike."""
    found = re.findall(r"^#+ (.+)$", without_code(document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", without_code(document.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        place = document.parent / target if target else document
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), link
        if document in PAGES:  # the site has nothing else
            assert place.absolute().resolve().is_relative_to(DOCS) or place.is_symlink(), link


@documents
def test_headings_of_a_page_have_anchors_of_their_own(document: Path) -> None:
    if document.name == "CHANGELOG.md":
        return
    text = without_code(document.read_text(encoding="utf-8"))
    assert len(re.findall(r"^#+ ", text, re.MULTILINE)) == len(anchors(document))


def test_every_page_is_in_the_site() -> None:
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_the_site_loads_nothing_from_elsewhere() -> None:
    """material asks for fonts at a third party unless it is told not to."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"^  font: false$", config, re.MULTILINE)
    assert "http" not in config
    for page in PAGES:  # diagrams would come with a program from a third party
        assert "```mermaid" not in page.read_text(encoding="utf-8"), page


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 9 * 1024


def sentences(document: Path) -> list[str]:
    """Sentences of its prose: paragraphs and list items, not tables."""
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*] |\s*\d+\. )", without_code(document.read_text(encoding="utf-8"))):
        if paragraph.lstrip().startswith(("|", "#", "!", ":::")):
            continue
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
        plain = re.sub(r"`[^`]*`", "code", plain)
        found += re.split(r"(?<=[.!?:;])\*{0,2}\s+", plain.strip())
    return found


@documents
def test_sentences_are_short(document: Path) -> None:
    for sentence in sentences(document):
        assert len(sentence.split()) <= 30, sentence


def commands() -> list[str]:
    """Every `depthprune` command of the documents, its continued lines joined."""
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS).replace("\\\n", " ")
    found = re.findall(r"^\s*(?:\.venv/bin/)?depthprune (\w+ .*)$|`depthprune (\w+ [^`]*)`", text, re.MULTILINE)
    return sorted({(a or b).strip() for a, b in found})


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str) -> None:
    """The command line knows each command and option that the documents show; nothing is run."""
    words = shlex.split(command, comments=True)
    name, options = words[0], [word for word in words if word.startswith("-")]
    subparsers = next(a for a in build_parser()._actions if a.choices and name in a.choices)
    known = subparsers.choices[name]._option_string_actions
    assert all(option in known for option in options), command


def python_blocks() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        blocks = re.findall(r"^```python\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        found += [(f"{document.relative_to(ROOT)}-{i}", block) for i, block in enumerate(blocks)]
    return found


@pytest.mark.parametrize("block", [b for _, b in python_blocks()], ids=[n for n, _ in python_blocks()])
def test_python_blocks_import_what_there_is(block: str) -> None:
    compile(block, "block", "exec")
    imports = "\n".join(line for line in block.splitlines() if line.startswith(("from ", "import ")))
    done = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


NAMED = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", NAMED)
def test_the_reference_names_what_there_is(name: str) -> None:
    home, _, last = name.rpartition(".")
    assert importlib.util.find_spec(home) is not None
    assert hasattr(importlib.import_module(home), last) or importlib.util.find_spec(name) is not None


def test_public_names_are_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in depthprune_runtime.__all__:
        assert name.startswith("__") or f"`{name}`" in text, name


@documents
def test_files_that_are_named_exist(document: Path) -> None:
    """`a/b.py` in the text is a path from the root, the package, the tests or the recorded rows."""
    for path in re.findall(r"`([\w./-]+\.(?:py|cpp|csv|md|toml))`", document.read_text(encoding="utf-8")):
        if "NAME" in path or path in NOT_THERE:
            continue
        places = (
            "",
            "depthprune_runtime",
            "depthprune_runtime/pruning",
            "benchmarks",
            "benchmarks/results",
            "tests/helpers",
        )
        assert any((ROOT / place / path).exists() for place in places), path


STEPS = sorted(DOCS.glob("add-*.md"))


@pytest.mark.parametrize("page", STEPS, ids=lambda d: d.name)
def test_steps_name_what_the_code_has(page: Path) -> None:
    folders = ("depthprune_runtime", "kernels", "csrc", "tests", "benchmarks")
    files = [f for folder in folders for kind in ("*.py", "*.h", "*.cpp") for f in (ROOT / folder).rglob(kind)]
    code = "\n".join(f.read_text(encoding="utf-8") for f in files if f.name != "test_docs.py")
    names = set(re.findall(r"`([A-Za-z_]\w*)[`(]", page.read_text(encoding="utf-8"))) - {"NAME", "define"}
    assert names
    for name in names:
        assert re.search(rf"\b{name}\b", code), name


def test_every_family_is_in_the_table_of_families():
    from depthprune_runtime.families import FAMILIES

    table = (DOCS / "hardware.md").read_text().split("## Sources")[0]
    assert set(re.findall(r"^\| ([a-z0-9_]+) \|", table, re.M)) - {"family"} == set(FAMILIES)
