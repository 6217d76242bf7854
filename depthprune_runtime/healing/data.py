"""Texts to train on: named ones, text files and JSON lines, as packed windows of tokens.

Documents follow each other, each ended by the EOS token, and are cut into windows without padding: a window may
begin in the middle of one and hold the next.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.text.tokenizer import Tokenizer
from depthprune_runtime.texts import NAMED_TEXTS, known_ids, load_text

_JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson")


@dataclass(frozen=True)
class Source:
    """A text and how often an epoch goes through it."""

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        good = isinstance(self.weight, int | float) and math.isfinite(self.weight) and self.weight > 0
        if not isinstance(self.text, str) or not self.text or not good:
            raise InputError(f"data: expected a text and a weight above 0, got {printable(repr(self))}")

    @property
    def name(self) -> str:
        return self.text if self.text in NAMED_TEXTS else Path(self.text).name


def parse_source(text: str) -> Source:
    """`FILE[:weight]`. A file whose name ends in a colon and a number needs a weight of its own."""
    name, colon, weight = text.rpartition(":")
    try:
        return Source(name, float(weight)) if colon else Source(text)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        return Source(text)


def _line_ids(tokenizer: Tokenizer, line: str, what: str) -> list[int]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: expected a JSON object, got {printable(line, 60)}") from error
    if isinstance(data, dict) and isinstance(data.get("text"), str):
        return tokenizer.encode(data["text"], add_special_tokens=False)
    if isinstance(data, dict) and isinstance(data.get("messages"), list):
        prompt = tokenizer.apply_chat_template(data["messages"], add_generation_prompt=False)
        return tokenizer.encode(prompt, add_special_tokens=False)
    keys = sorted(data) if isinstance(data, dict) else type(data).__name__
    raise InputError(f"{what}: expected an object with `text` or a list of `messages`, got {printable(keys)}")


def _documents(source: Source, contents: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of every document of `contents`."""
    if not source.text.endswith(_JSON_LINES):
        yield tokenizer.encode(contents, add_special_tokens=False)
        return
    for number, line in enumerate(contents.split("\n"), 1):
        if line.strip():
            yield _line_ids(tokenizer, line, f"data {source.name}: line {number}")


@dataclass(frozen=True)
class Windows:
    """Windows of all texts, text behind text. counts: of each text's; description: JSON for the provenance."""

    ids: Tensor  # [N, S] int64
    counts: tuple[int, ...]
    sources: tuple[Source, ...]
    description: tuple[dict[str, object], ...]


def packed_windows(sources: Sequence[Source], tokenizer: Tokenizer, seq_len: int, vocab_size: int) -> Windows:
    """Read, tokenise and cut all `sources`; what does not fill a window at the end of one is left out.

    Raises InputError for a text that cannot be read, or that does not fill a window.
    """
    if not sources:
        raise InputError("data: expected at least one text to train on, got none")
    end = tokenizer.special_token_id("eos_token")
    made, description = [], []
    for source in sources:
        contents = load_text(source.text)
        ids: list[int] = []
        for document in _documents(source, contents, tokenizer):
            ids += document if end is None else [*document, end]
        known_ids(ids, vocab_size, tokenizer.name)
        count = len(ids) // seq_len
        if count == 0:
            raise InputError(
                f"data {source.name}: {len(ids):,} tokens do not fill a window of {seq_len}; give more text"
            )
        made.append(torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len))
        digest = hashlib.sha256(contents.encode()).hexdigest()
        description.append({"text": source.name, "text_sha256": digest, "weight": source.weight, "windows": count})
    return Windows(torch.cat(made), tuple(map(len, made)), tuple(sources), tuple(description))
