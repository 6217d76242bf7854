"""`Tokenizer`: text <-> token ids from the files inside a checkpoint, without importing Transformers.

Importing Transformers costs more time than loading a small model, so only chat templates do it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from depthprune_runtime.checkpoint.base import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Checkpoint,
)
from depthprune_runtime.errors import InputError
from depthprune_runtime.heap import return_free_heap
from depthprune_runtime.token_lengths import TokenLengths, token_lengths

_LONG = 8192  # characters: some milliseconds


def _json_asset(assets: Mapping[str, bytes], name: str) -> dict[str, Any]:
    data = json.loads(assets.get(name, b"{}"))
    return data if isinstance(data, dict) else {}


def _token_text(token: object) -> str | None:
    """A special token is stored as text or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's generation_config.json; empty where it has none."""
    return _json_asset(checkpoint.assets, GENERATION_CONFIG_FILE)


class Tokenizer:
    """The checkpoint's tokenizer. Raises InputError if the checkpoint carries none."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assets = checkpoint.assets
        if TOKENIZER_FILE not in assets:
            raise InputError(
                f"{checkpoint.name}: it carries no tokenizer, so text cannot be used; give token ids, or put "
                f"{TOKENIZER_FILE} beside the source model and import it again"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(assets[TOKENIZER_FILE].decode())
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{checkpoint.name}: its {TOKENIZER_FILE} cannot be read: {error}") from error
        return_free_heap()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = _json_asset(assets, TOKENIZER_CONFIG_FILE)
        template = assets.get(CHAT_TEMPLATE_FILE)
        self.chat_template: str | None = template.decode() if template else self._config.get("chat_template")
        self.name = checkpoint.name

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens (such as a leading BOS) as the model's tokenizer adds them."""
        try:
            if len(text) < _LONG:
                ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            else:  # only a batch releases the GIL
                ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:  # all that the library says
            got = "a lone surrogate in it; decode the text as UTF-8" if isinstance(text, str) else type(text).__name__
            raise InputError(f"text: expected Unicode text, got {got}") from error
        return ids

    @functools.cached_property
    def token_lengths(self) -> TokenLengths | None:
        """Tells how many tokens a text has at least; None where that is not known."""
        return token_lengths(self._tokenizer)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def special_token_id(self, name: str) -> int | None:
        """Id of `bos_token`, `eos_token` or another named special token; None if there is none."""
        text = _token_text(self._config.get(name))
        return None if text is None else self._tokenizer.token_to_id(text)

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        return TextStream(self._tokenizer, skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Prompt for `messages` (dicts with role and content), ending where the assistant's turn begins."""
        if self.chat_template is None:
            raise InputError(f"{self.name}: it has no chat template; use generate with a plain prompt")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise InputError(f"messages[{i}]: expected an object with role and content, got {message!r}")
        if not messages:
            raise InputError("messages: expected at least one message, got none")
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special: dict[str, Any] = {n: t for n in names if (t := _token_text(self._config.get(n))) is not None}
        try:
            rendered = render_jinja_template(
                conversations=[[dict(m) for m in messages]],
                chat_template=self.chat_template,
                add_generation_prompt=True,
                **special,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"messages: refused by the model's chat template: {error}") from error
        return str(rendered[0][0])


class TextStream:
    """Text of a growing id sequence; characters whose bytes are not complete yet are held back."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """New text after one more token, possibly empty."""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._emitted += len(text)
        return text

    def flush(self) -> str:
        """What is left at the end: incomplete bytes come out as replacement characters."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        rest = whole[self._emitted :]
        self._emitted = len(whole)
        return rest
