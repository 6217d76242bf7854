"""Texts by name or file: for calibration and for perplexity.

`builtin` and `builtin-test` are two parts of the English help topics that every CPython carries
(pydoc_data.topics), so that nothing needs a download; what one tells, the other does not (`split_texts`).
`wikitext2`, `wikitext2-valid` and `wikitext2-test` are WikiText-2 raw; `wikitext2-joined` is its training part with
the rows joined by blanks, as FinerCut's official script calibrates.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.paths import source_path

_WIKITEXT_FILES = {
    "wikitext2": ("wiki.train.raw", "wiki.train.head.raw"),
    "wikitext2-valid": ("wiki.valid.raw",),
    "wikitext2-test": ("wiki.test.raw",),
}
_WIKITEXT_SPLITS = {"wikitext2": "train", "wikitext2-valid": "validation", "wikitext2-test": "test"}
NAMED_TEXTS = ("builtin", "builtin-test", *_WIKITEXT_FILES, "wikitext2-joined")
DATA_VARIABLE = "DEPTHPRUNE_DATA"
_RUN = 8  # words; paragraphs that share so many in a row are not told apart
_PARTS = 4  # one of which is the test


def text_file(source: str) -> tuple[Path, ...]:
    """The file that `load_text` would read, if it is one that the caller named."""
    if not isinstance(source, str):
        raise InputError(f"text: expected a name or a path, got {printable(repr(source))}")
    return () if source in NAMED_TEXTS else (source_path(source, "text"),)


def known_ids(ids: list[int], vocab_size: int, model: str) -> list[int]:
    """`ids` of a text, all of which `model` must have a row of its embedding for."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise InputError(
            f"{model}: its tokenizer makes token id {max(ids)} of this text, but its embedding has {vocab_size} rows; "
            "the tokenizer is that of another model"
        )
    return ids


def load_text(source: str) -> str:
    """Text of a named source or of a UTF-8 file (plain or .gz). Raises InputError in one line."""
    files = text_file(source)
    if source in ("builtin", "builtin-test"):
        return _builtin(test=source == "builtin-test")
    if source in _WIKITEXT_FILES:
        return _wikitext2(source)
    if source == "wikitext2-joined":
        return rows_joined(_wikitext2("wikitext2"), " ")
    (path,) = files
    if not path.is_file():
        raise InputError(f"text {printable(source)}: no such file, and not one of {', '.join(NAMED_TEXTS)}")
    return _read(path)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text {path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it first"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"text {path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"text {path}: cannot be read: {error.strerror}") from error


def _builtin(test: bool) -> str:
    from pydoc_data.topics import topics

    calibration, held_out = split_texts(text for _, text in sorted(topics.items()))
    return held_out if test else calibration


def split_texts(texts: Iterable[str]) -> tuple[str, str]:
    """(three quarters, a quarter) of the paragraphs of `texts`, each one once, in order.

    No run of 8 words within a paragraph is in both: paragraphs that share one are a family, and a family goes to the
    side that the digest of its words says. So a paragraph's side depends on its family alone, not on its place.
    """
    paragraphs: dict[str, str] = {}  # words -> as written
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    paragraphs.pop("", None)
    sides: tuple[list[str], list[str]] = ([], [])
    families = _families(list(paragraphs))
    for words, family in zip(paragraphs, families, strict=True):
        sides[int(family, 16) % _PARTS == _PARTS - 1].append(paragraphs[words])
    return "\n\n".join(sides[0]), "\n\n".join(sides[1])


def _families(paragraphs: list[str]) -> list[str]:
    """The least digest among all paragraphs that each one is tied to by shared runs of _RUN words."""
    leader = list(range(len(paragraphs)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    first_with: dict[tuple[str, ...], int] = {}
    for i, paragraph in enumerate(paragraphs):
        words = paragraph.split()
        for at in range(len(words) - _RUN + 1):
            other = first_with.setdefault(tuple(words[at : at + _RUN]), i)
            leader[find(i)] = find(other)
    digests = [hashlib.sha256(paragraph.encode()).hexdigest() for paragraph in paragraphs]
    least: dict[int, str] = {}
    for i, digest in enumerate(digests):
        least[find(i)] = min(digest, least.get(find(i), digest))
    return [least[find(i)] for i in range(len(paragraphs))]


def _wikitext2(source: str) -> str:
    folder = os.environ.get(DATA_VARIABLE)
    if folder:
        for name in _WIKITEXT_FILES[source]:
            for path in (Path(folder) / "wikitext2" / name, Path(folder) / "wikitext2" / f"{name}.gz"):
                if path.is_file():
                    return _read(path)
    try:
        import datasets
    except ImportError as error:
        wanted = " or ".join(_WIKITEXT_FILES[source])
        raise InputError(
            f"text {source}: set {DATA_VARIABLE} to a folder with wikitext2/{wanted}, or install the extra [data]"
        ) from error
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=_WIKITEXT_SPLITS[source])
    except Exception as error:  # network, cache and format errors of many types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"text {source}: cannot be downloaded: {reason}") from error
    return "".join(row or " \n" for row in rows["text"])


def rows_joined(text: str, separator: str = "\n\n") -> str:
    """The data set's rows joined, by default by blank lines, as GPTQ and most pruning papers tokenise WikiText-2.

    An empty line of the file is an empty row; every other row keeps its line end, which the last one may lack.
    """
    *lines, last = text.split("\n")
    rows = ["" if not line.strip() else line + "\n" for line in lines]
    return separator.join([*rows, last] if last else rows)
