"""`Tokenizer`: text <-> token ids from the files inside a checkpoint, without importing Transformers.

Importing Transformers costs more time than loading a small model.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import tokenizers
from typing_extensions import Unpack

from depthprune_runtime.checkpoint.base import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Checkpoint,
)
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.host.heap import return_free_heap
from depthprune_runtime.text.detokenizer import Detokenizer, is_library_error
from depthprune_runtime.text.stream import TextStream
from depthprune_runtime.text.token_lengths import TokenLengths, token_lengths

if TYPE_CHECKING:
    from depthprune_runtime.text.chat_template import Prompt

_LONG = 8192  # characters: some milliseconds


class ChatFields(TypedDict, total=False):
    """What `Tokenizer.apply_chat_template` takes by keyword, all optional."""

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template: str | None
    add_generation_prompt: bool | None
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any] | None


CHAT_OPTIONS = tuple(ChatFields.__annotations__)


def _text_asset(checkpoint: Checkpoint, name: str) -> str | None:
    data = checkpoint.assets.get(name)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{checkpoint.name}: its {name} is not UTF-8: {error}") from error


def _json_asset(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    text = _text_asset(checkpoint, name) or "{}"
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{checkpoint.name}: its {name} is not JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _token_text(token: object) -> str | None:
    """A special token is stored as text or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


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
        except BaseException as error:
            if not is_library_error(error):
                raise
            raise InputError(f"{checkpoint.name}: its {TOKENIZER_FILE} cannot be read: {printable(error)}") from error
        return_free_heap()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.detokenizer = Detokenizer(self._tokenizer)
        self._config = _json_asset(checkpoint, TOKENIZER_CONFIG_FILE)
        self.chat_templates = _chat_templates(_text_asset(checkpoint, CHAT_TEMPLATE_FILE), self._config)
        self.name = checkpoint.name

    @property
    def chat_template(self) -> str | None:
        """The model's default chat template; None if it has none."""
        return self.chat_templates.get("default")

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`.

        add_special_tokens: add those that the model's tokenizer adds, such as a leading BOS. split_special_tokens: read
        special tokens in `text`, such as `<|im_end|>`, as ordinary text; otherwise they are the tokens that control the
        model, whoever wrote them. Raises InputError for text that cannot be encoded.
        """
        tokenizer = self._splitting if split_special_tokens else self._tokenizer
        with self._encoding(text):
            if len(text) < _LONG:
                ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            else:  # only a batch releases the GIL
                ids = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    @functools.cached_property
    def token_lengths(self) -> TokenLengths | None:
        """Tells how many tokens a text has at least; None where that is not known."""
        return token_lengths(self._tokenizer)

    @contextlib.contextmanager
    def _encoding(self, text: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not is_library_error(error):
                raise
            if not isinstance(text, str):
                reason = f"expected Unicode text, got {type(text).__name__}"
            elif _has_surrogates(text):
                reason = "expected Unicode text, got lone surrogates in it; decode the text as UTF-8"
            else:
                reason = str(error)
            raise InputError(f"{self.name}: the text cannot be encoded: {reason}") from error

    @functools.cached_property
    def _splitting(self) -> tokenizers.Tokenizer:
        """A second tokenizer, for the switch is one of the whole tokenizer, and threads share it."""
        tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`, integers of any kind; those without a token have none."""
        try:
            known = [operator.index(i) for i in ids]
        except TypeError as error:
            raise InputError(f"ids: expected a sequence of token ids: {error}") from error
        return self.detokenizer.decode(known, skip_special_tokens)

    def special_token_id(self, name: str) -> int | None:
        """Id of `bos_token`, `eos_token` or another named special token; None if there is none."""
        text = _token_text(self._config.get(name))
        return None if text is None else self._tokenizer.token_to_id(text)

    def stream(self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> TextStream:
        """Text of the tokens that follow `prompt_ids`."""
        return TextStream(self.detokenizer, skip_special_tokens, prompt_ids)

    def apply_chat_template(self, messages: Sequence[Any], **options: Unpack[ChatFields]) -> str:
        """Prompt for a conversation, by the model's chat template.

        Args:
            messages: objects with role and content. Content is text, or a list of parts of the type `text`; it may
                be missing beside `tool_calls`.
            tools: JSON schemas of the functions that the model may call.
            documents: objects that templates for retrieval read.
            chat_template: a template, or the name of one of the model's; by default `tool_use` if there are tools and
                the model has one, else `default`.
            add_generation_prompt: begin the assistant's message; by default unless continue_final_message.
            continue_final_message: end within the last message, for the model to go on with it.
            chat_template_kwargs: further variables of the template, such as `enable_thinking`.

        Returns:
            The prompt, with all special tokens that the template writes: encode it without adding any.

        Raises:
            InputError: for messages that are none, and whatever the template raises. A template may take
                200,000 loop rounds and calls, 5 seconds of processor time, and values of 16 million characters.
        """
        return self._render(messages, options, quote=False).text

    def encode_chat(
        self, messages: Sequence[Any], split_special_tokens: bool = False, **options: Unpack[ChatFields]
    ) -> tuple[str, list[int]]:
        """The prompt of `apply_chat_template` and its token ids.

        split_special_tokens: read special tokens in what the template is given as ordinary text, so that only those
        that the template itself writes control the model.
        """
        prompt = self._render(messages, options, split_special_tokens)
        if not prompt.quoted:
            return prompt.text, self.encode(prompt.text, add_special_tokens=False)
        with self._encoding(prompt.text):
            encoded = self._tokenizer.encode_batch([prompt.text], add_special_tokens=False)[0]
        starts = [start for start, _ in prompt.quoted]
        ids: list[int] = []
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            at = bisect.bisect_left(starts, start)
            if token in self.detokenizer.special and at < len(starts) and starts[at] < end:
                ids += self.encode(prompt.text[start:end], add_special_tokens=False, split_special_tokens=True)
            else:
                ids.append(token)
        return prompt.text, ids

    def _render(self, messages: Sequence[Any], options: ChatFields, quote: bool) -> Prompt:
        if not self.chat_templates and options.get("chat_template") is None:
            raise InputError(f"{self.name}: it has no chat template; use generate with a plain prompt")
        unknown = sorted(set(options) - set(CHAT_OPTIONS))
        if unknown:
            raise InputError(f"unknown options {unknown}; known are {sorted(CHAT_OPTIONS)}")
        from depthprune_runtime.text.chat_template import ChatTemplate

        special = {n: t for n, v in self._config.items() if n.endswith("_token") and (t := _token_text(v)) is not None}
        template = ChatTemplate(self.chat_templates, special, self.detokenizer.special.values() if quote else ())
        return template.render(messages, **options, quote=quote)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _chat_templates(file: str | None, config: Mapping[str, Any]) -> dict[str, str]:
    """Template by name, from the file of the default one and what the tokenizer's config has: one, or a list."""
    stated = config.get("chat_template")
    if isinstance(stated, str):
        stated = {"default": stated}
    elif isinstance(stated, list):
        named = [(t.get("name"), t.get("template")) for t in stated if isinstance(t, dict)]
        stated = {name: text for name, text in named if isinstance(name, str)}
    found = dict(stated) if isinstance(stated, dict) else {}
    if file is not None:
        found["default"] = file
    return {name: text for name, text in found.items() if isinstance(text, str)}
