"""`TextStream`: the text of a growing id sequence, as it comes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from depthprune_runtime.text.detokenizer import REPLACEMENT, Detokenizer

_CONTEXT = 8  # tokens decoded again before new ones; at least 4, the bytes of a character
_WINDOW = 16  # tokens from which on older ones are left out
_LONGEST_WINDOW = 64  # with older ones that are needed, for the others have no text


class TextStream:
    """Text of the tokens that follow a prompt. Concatenated, the texts are what the tokens add to the prompt's text.

    A token's text depends on those before it: a word keeps its space only behind another, and a character may be spread
    over several tokens. So a window of the last tokens is decoded with the new one, and what that adds is the news. The
    cost of a token does not grow with the text. A last character that is incomplete is held back.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = detokenizer
        self._spaces = spaces_between_special_tokens or skip_special_tokens
        self._behind_special = False
        self._skip = skip_special_tokens
        self._window = self._last_with_text(prompt_ids)
        self._shown: str | None = self._decode()  # handed out, or the prompt's; None: all of it, not decoded yet
        self._ready = self._shown != "" and not self._shown.endswith(REPLACEMENT)

    def _last_with_text(self, ids: Sequence[int]) -> list[int]:
        """The last of `ids`: as many as have a text, which decides how the next token is written."""
        found: list[int] = []
        wanted = _CONTEXT
        for token_id in reversed(ids):
            if self._detokenizer.has_text(token_id, self._skip):
                found.append(token_id)
                if len(found) == wanted:
                    if self._detokenizer.decode(found[::-1], self._skip):
                        break
                    wanted *= 2
        return found[::-1]

    def fork(self) -> TextStream:
        """A stream of its own that goes on from here."""
        twin = copy.copy(self)
        twin._window = list(self._window)
        return twin

    def push(self, token_id: int) -> str:
        """New text after one more token, possibly empty."""
        if self._spaces:
            return self._push(token_id)
        # some decoders write spaces around special tokens; between two of them they are left out
        special = self._detokenizer.special.get(token_id)
        news = self._push(token_id)
        news = special if special is not None and self._behind_special else news
        self._behind_special = special is not None
        return news

    def _push(self, token_id: int) -> str:
        if self._ready:  # between two characters, behind some text
            piece = self._detokenizer.pieces.get(token_id)
            if piece is not None:
                self._window = [token_id]
                self._shown = None
                return piece
        if not self._detokenizer.has_text(token_id, self._skip):
            return ""
        shown, was_ready = self._known_shown(), self._ready
        self._window.append(token_id)
        text = self._decode()
        stable = _stable(text)
        news = self._advance(shown, stable)
        self._ready = stable == text != ""
        if was_ready and self._ready:
            self._learn(token_id, news)
        if len(self._window) >= _WINDOW:
            self._trim()
        return news

    def flush(self) -> str:
        """What is left at the end: incomplete bytes come out as replacement characters."""
        return self._advance(self._known_shown(), self._decode())

    def _decode(self) -> str:
        return self._detokenizer.decode(self._window, self._skip)

    def _known_shown(self) -> str:
        return self._decode() if self._shown is None else self._shown

    def _advance(self, shown: str, text: str) -> str:
        """What `text` has beyond `shown`; what was shown cannot be taken back."""
        if shown.startswith(text):
            self._shown = shown
            return ""
        self._shown = text
        return text[len(shown) :] if text.startswith(shown) else text[_first_difference(shown, text) :]

    def _learn(self, token_id: int, piece: str) -> None:
        """Remember the text of a token that needs no others, where the tokenizer writes token by token."""
        if self._detokenizer.token_by_token and token_id not in self._detokenizer.special:
            alone = self._detokenizer.decode([token_id], self._skip)
            if alone and not alone.endswith(REPLACEMENT):
                self._detokenizer.pieces[token_id] = piece
                self._window, self._shown = [token_id], alone

    def _trim(self) -> None:
        """Leave out what the window no longer needs."""
        tail = self._window[-_CONTEXT:]
        text = self._detokenizer.decode(tail, self._skip)
        if text or len(self._window) >= _LONGEST_WINDOW:
            self._window, self._shown = tail, _stable(text)
            self._ready = self._ready and text != ""


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _stable(text: str) -> str:
    """`text` without a last character that further bytes may complete."""
    return text[:-1] if text.endswith(REPLACEMENT) else text
