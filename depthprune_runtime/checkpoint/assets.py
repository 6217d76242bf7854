"""The files around the weights: checked before a library sees them, and made only when they are asked for."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from depthprune_runtime.checkpoint.gate import parse_object, read_object
from depthprune_runtime.errors import InputError, printable

# The tokenizers library walks all ids up to the largest when it saves; vocabularies end below a million.
MAX_TOKEN_ID = 9_999_999
_MANY_DIGITS = re.compile(rb"[0-9]{8}")


def check_token_id(value: object, what: str) -> int:
    """`value` as a token id. Raises InputError, beginning with `what`, for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_TOKEN_ID:
        raise InputError(f"{what}: expected a token id from 0 to {MAX_TOKEN_ID}, got {printable(repr(value))}")
    return value


def _check_vocabulary(vocab: Mapping[str, Any], what: str) -> None:
    for token, value in vocab.items():
        if not (type(value) is int and 0 <= value <= MAX_TOKEN_ID):
            check_token_id(value, f"{what}: token {printable(repr(token), 60)}")


def check_tokenizer_json(data: bytes, what: str) -> None:
    """Refuse a tokenizer.json whose ids would make the tokenizers library fill the memory.

    Only a file with a number of eight digits can hold such an id, so others are not parsed. what: the file's name,
    for the message. Raises InputError.
    """
    if not _MANY_DIGITS.search(data):
        return
    content = parse_object(data, what)
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    _check_vocabulary(vocab if isinstance(vocab, dict) else {}, what)
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            check_token_id(token.get("id"), f"{what}: token {printable(repr(token.get('content')), 60)}")


class LazyAssets(Mapping[str, bytes]):
    """Assets by file name, each made when it is first read, so that a tokenizer that nobody uses costs nothing."""

    def __init__(self, makers: Mapping[str, Callable[[], bytes]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def one_line(error: BaseException) -> str:
    """What a library says is wrong, as one line."""
    return printable(" ".join(str(error).split()), 300) or type(error).__name__


class _Printable(logging.Filter):
    """Makes every message one line that a terminal shows as it is: libraries quote a file's values as they are."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), 1000), None
        return True


@contextlib.contextmanager
def _printable_warnings() -> Iterator[None]:
    """With what Transformers logs made printable."""
    from transformers.utils import logging as library_logging

    library_logging.get_logger()  # adds its handler
    handlers, escaping = logging.getLogger("transformers").handlers[:], _Printable()
    for handler in handlers:
        handler.addFilter(escaping)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(escaping)


def transformers_config(folder: Path) -> Any:
    """Transformers' config of the model in `folder`; no Python from the folder runs."""
    from transformers import AutoConfig

    with _printable_warnings():
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def transformers_tokenizer(folder: Path) -> Any:
    """Transformers' tokenizer of the model in `folder`; no Python from the folder runs, nothing is asked."""
    from transformers import AutoTokenizer

    path, vocab = folder / "tokenizer.json", folder / "vocab.json"
    if path.is_file():
        check_tokenizer_json(path.read_bytes(), str(path))
    elif vocab.is_file():
        _check_vocabulary(read_object(vocab), str(vocab))
    with _printable_warnings():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
