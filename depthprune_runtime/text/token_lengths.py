"""`TokenLengths`: how many tokens a text has at least, told without tokenising it.

    tokens(text) >= characters that come to be a part of a token / characters that one token stands for at most

That holds only where nothing drops characters, or takes any number of them as one. A normaliser, a pre-tokenizer, an
added token or a model that may do so has no `TokenLengths`: such a text has to be tokenised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from depthprune_runtime.text.detokenizer import byte_characters

# Unicode composition makes one character of at most so many: U+03B1 U+0313 U+0300 U+0345 becomes U+1F82.
_COMPOSED = 4
_COMPOSING = ("NFC", "NFKC")
_KEEPING_NORMALIZERS = ("Prepend", "NFD", "NFKD")
_KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits")
_NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


@dataclass(frozen=True)
class TokenLengths:
    """longest: characters of a text that one token stands for at most; dropped: characters without a token."""

    longest: int
    dropped: str = ""

    def least(self, text: str) -> int:
        """So many tokens `text` has, or more."""
        kept = len(text) - sum(map(text.count, self.dropped))
        return -(-kept // self.longest)


def token_lengths(tokenizer: tokenizers.Tokenizer) -> TokenLengths | None:
    """None where no limit is known. Takes a tenth of a second with a large vocabulary."""
    shrinks = _normalizer_shrinks(_state(tokenizer.normalizer))
    added = tokenizer.get_added_tokens_decoder().values()
    pre_tokenizer = _state(tokenizer.pre_tokenizer)
    if shrinks is None or not _keeps_all(pre_tokenizer) or any(t.lstrip or t.rstrip for t in added):
        return None
    model = tokenizer.model
    if not isinstance(model, tokenizers.models.BPE):
        return None
    if model.byte_fallback:
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    elif '"ByteLevel"' in json.dumps(pre_tokenizer):
        alphabet = byte_characters()
    else:
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    missing = [byte for byte in range(256) if alphabet[byte] not in vocabulary and byte not in _NEVER_IN_UTF8]
    # A character of several bytes stays as long as the bytes behind its first have tokens.
    if (model.unk_token is not None and missing) or any(0x80 <= byte < 0xC0 for byte in missing):
        return None
    dropped = "".join(chr(byte) for byte in missing if byte < 0x80)
    return TokenLengths(shrinks * max(map(len, vocabulary)), dropped)


def _state(part: Any) -> Mapping[str, Any]:
    """The description of a normaliser or pre-tokenizer, as in tokenizer.json; empty where there is none."""
    if part is None:
        return {}
    found = json.loads(part.__getstate__())
    return found if isinstance(found, dict) else {"type": "unknown"}


def _normalizer_shrinks(state: Mapping[str, Any]) -> int | None:
    """How many characters it makes one of at most; None where that has no limit."""
    kind = state.get("type")
    if kind is None or kind in _KEEPING_NORMALIZERS:
        return 1
    if kind in _COMPOSING:
        return _COMPOSED
    if kind == "Replace":
        pattern = state["pattern"].get("String")
        return 1 if pattern and len(state["content"]) >= len(pattern) else None
    if kind == "Sequence":
        total = 1
        for part in state["normalizers"]:
            shrinks = _normalizer_shrinks(part)
            if shrinks is None:
                return None
            total *= shrinks
        return total
    return None


def _keeps_all(state: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer hands on every character."""
    kind = state.get("type")
    if kind == "Sequence":
        return all(map(_keeps_all, state["pretokenizers"]))
    if kind == "Split":
        return str(state["behavior"]) != "Removed"
    return kind is None or kind in _KEEPING_PRE_TOKENIZERS
