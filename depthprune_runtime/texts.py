"""Texts by name or file: for calibration and for perplexity.

`builtin` and `builtin-test` are the two halves of the English help topics that every CPython carries
(pydoc_data.topics), so that nothing needs a download; `wikitext2` and `wikitext2-test` are WikiText-2 raw.
"""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

from depthprune_runtime.errors import InputError, printable

_WIKITEXT_FILES = {
    "wikitext2": ("wiki.train.raw", "wiki.train.head.raw"),
    "wikitext2-valid": ("wiki.valid.raw",),
    "wikitext2-test": ("wiki.test.raw",),
}
_WIKITEXT_SPLITS = {"wikitext2": "train", "wikitext2-valid": "validation", "wikitext2-test": "test"}
NAMED_TEXTS = ("builtin", "builtin-test", *_WIKITEXT_FILES)
DATA_VARIABLE = "DEPTHPRUNE_DATA"


def text_file(source: str) -> tuple[Path, ...]:
    """The file that `load_text` would read, if it is one that the caller named."""
    if not isinstance(source, str):
        raise InputError(f"text: expected a name or a path, got {printable(repr(source))}")
    return () if source in NAMED_TEXTS else (Path(source).expanduser(),)


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
    """Every fourth topic is kept for testing, the others for calibration."""
    from pydoc_data.topics import topics

    chosen = [text for i, (_, text) in enumerate(sorted(topics.items())) if (i % 4 == 3) == test]
    return "\n\n".join(text.strip() for text in chosen)


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


def rows_joined(text: str) -> str:
    """The data set's rows joined by blank lines, as GPTQ and most pruning papers tokenise WikiText-2.

    An empty line of the file is an empty row; every other row keeps its line end.
    """
    rows = ["" if not line.strip() else line + "\n" for line in text.split("\n")[:-1]]
    return "\n\n".join(rows)
