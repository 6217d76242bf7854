"""`Detokenizer`: token ids -> text. Never fails: whatever a model samples has a text, possibly none.

It equals the tokenizers library, but for runs of byte tokens (`<0xE2>`, as Llama 2 and Mistral have) that are not UTF-8
as a whole. The library then replaces every byte of the run, also those of characters that are complete; here, as in
SentencePiece and as with byte-level tokenizers, only what is no character becomes U+FFFD.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_ID = 2**32 - 1  # of the library
_TOKEN_BY_TOKEN = {"ByteLevel", "Metaspace", "WordPiece"}  # decoders of which each token has a text of its own
_IN_SEQUENCE = {"Replace", "ByteFallback", "Fuse", "Strip", "ByteLevel", "Metaspace"}
_log = logging.getLogger("depthprune_runtime")


def is_library_error(error: BaseException) -> bool:
    """Whether the tokenizers library raised `error`; its panics are no `Exception`."""
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


class Detokenizer:
    """Texts of the tokens of one tokenizer. Threads may share it."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder
        stages = _stages(tokenizer)
        kinds = [stage.get("type") for stage in stages]
        self._byte_fallback = "ByteFallback" in kinds
        self._byte_level = "ByteLevel" in kinds
        self.token_by_token = all(_is_token_by_token(stage, alone=len(stages) == 1) for stage in stages)
        added = tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special = {i: token.content for i, token in added.items() if token.special}
        self.pieces: dict[int, str] = {}  # id -> text behind another token, as streams learn them
        self._texts: dict[int, str | None] = {}
        self._failed = False

    def has_text(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether the token takes part in a text: ids without a token do not, nor special tokens if skipped."""
        if not 0 <= token_id <= _MAX_ID or (skip_special_tokens and token_id in self.special):
            return False
        return self._tokenizer.id_to_token(token_id) is not None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; those without a token have none."""
        known = [i for i in ids if 0 <= i <= _MAX_ID]
        try:
            text: str = self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)
            if self._byte_fallback and REPLACEMENT in text:
                text = self._decoder.decode(_characters_apart(self._tokens(known, skip_special_tokens)))
        except BaseException as error:
            if not is_library_error(error):
                raise
            self._warn(error)
            text = "".join(self._tokens(known, skip_special_tokens))
        return text

    def token_text(self, token_id: int) -> str | None:
        """What the token is in the middle of a text, with its space; None for an id without a token.

        Bytes that are no character by themselves are written as `<0xE2>`: different tokens have different texts.
        """
        try:
            return self._texts[token_id]
        except KeyError:
            text = self._texts[token_id] = self._token_text(token_id)
            return text

    def _token_text(self, token_id: int) -> str | None:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id <= _MAX_ID else None
        if token is None or token_id in self._added or (self._byte_fallback and _BYTE_TOKEN.fullmatch(token)):
            return token
        alone = self.decode([token_id], skip_special_tokens=False)
        if self._byte_level and REPLACEMENT in alone:
            return _spelled(token)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :]

    def _tokens(self, ids: Iterable[int], skip_special_tokens: bool) -> list[str]:
        names = (self._tokenizer.id_to_token(i) for i in ids if not (skip_special_tokens and i in self.special))
        return [name for name in names if name is not None]

    def _warn(self, error: BaseException) -> None:
        if not self._failed:
            self._failed = True
            _log.warning(
                "the tokenizer's decoder failed (%s); such text shows its tokens as the vocabulary has them", error
            )


def _stages(tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The parts of the tokenizer's decoder; none if it has no decoder."""
    if tokenizer.decoder is None:
        return []
    stored = json.loads(tokenizer.decoder.__getstate__())
    return list(stored["decoders"]) if stored.get("type") == "Sequence" else [stored]


def _is_token_by_token(stage: dict[str, Any], alone: bool) -> bool:
    """Whether the stage gives each token a text that does not depend on the others, once there is one before it."""
    kind = stage.get("type")
    if kind == "Replace":
        return len(stage.get("pattern", {}).get("String", "")) == 1
    if kind == "Strip":
        return stage.get("stop") == 0
    return kind in (_TOKEN_BY_TOKEN if alone else _IN_SEQUENCE)


def _characters_apart(tokens: list[str]) -> list[str]:
    """`tokens` with all bytes that are no characters replaced, so that the library decodes the others."""
    found: list[str] = []
    run = bytearray()
    for token in [*tokens, ""]:
        match = _BYTE_TOKEN.fullmatch(token)
        if match is not None:
            run.append(int(match[1], 16))
            continue
        for part in re.split(f"({REPLACEMENT})", run.decode(errors="replace")):
            found += [part] if part == REPLACEMENT else [f"<0x{byte:02X}>" for byte in part.encode()]
        run.clear()
        found.append(token)
    return found[:-1]


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table).

    Printable bytes stand for themselves, the others for characters from U+0100 on.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]


_BYTES = {character: byte for byte, character in enumerate(byte_characters())}


def _spelled(token: str) -> str:
    """Text of a byte-level token, its incomplete bytes as `<0xE2>`."""
    if not all(character in _BYTES for character in token):
        return token
    text = bytes(_BYTES[character] for character in token).decode(errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)
