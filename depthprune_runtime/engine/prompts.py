"""Prompts as users give them: text, token ids, or one of vLLM's two dictionaries. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depthprune_runtime.engine.values import as_integer, refuse
from depthprune_runtime.errors import InputError

Prompt = str | Sequence[int] | Mapping[str, Any]
_EXPECTED = "a string or a sequence of token ids"
_KEYS = ({"prompt"}, {"prompt_token_ids"}, {"prompt", "prompt_token_ids"})


def text_and_ids(prompt: object, what: str) -> tuple[str | None, Any]:
    """Text of `prompt` and its token ids; at least one of them is there, and the ids, unchecked, decide.

    Accepts {"prompt": text} and {"prompt_token_ids": ids}, the latter also with the text it stands for.
    """
    text, ids = None, prompt
    if isinstance(prompt, Mapping):
        if set(prompt) not in _KEYS:
            refuse(what, 'a dictionary of "prompt" or "prompt_token_ids"', dict(prompt))
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            refuse(what, 'a string as "prompt"', text)
    elif isinstance(prompt, str):
        text, ids = prompt, None
    if (text is None or ids is not None) and not _is_sequence(ids):
        raise InputError(f"{what}: expected {_EXPECTED}, got {type(ids).__name__}")
    return text, ids


def _is_sequence(value: object) -> bool:
    if hasattr(value, "tolist") and getattr(value, "ndim", None) is not None:  # numpy and torch
        return bool(value.ndim)  # type: ignore[attr-defined]
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def listed(prompts: object) -> list[tuple[str, Prompt]]:
    """(name for messages, prompt) of a single prompt or each of several."""
    if isinstance(prompts, str | Mapping):
        return [("prompt", prompts)]
    if not _is_sequence(prompts):
        refuse("prompts", f"{_EXPECTED}, or a list of such", prompts)
    found: list[Any] = list(prompts)  # type: ignore[call-overload]
    if not found:
        raise InputError("prompts: expected at least one prompt, got none")
    if all(isinstance(p, bool) or as_integer(p) is not None for p in found):
        found = [prompts]
    return [("prompt" if len(found) == 1 else f"prompts[{i}]", p) for i, p in enumerate(found)]
