"""Log-probabilities as the two routes report them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from depthprune_runtime.engine.outputs import Logprob

Rows = Sequence[dict[int, Logprob]]  # one a token, id -> its log-probability


def _name(token: int, found: Logprob) -> str:
    return f"token_id:{token}" if found.decoded_token is None else found.decoded_token


def completion_logprobs(ids: Sequence[int], rows: Rows, count: int, offset: int) -> dict[str, Any]:
    """The form of /v1/completions. count: alternatives to list; offset: of the first token in the text."""
    tokens = [_name(token, row[token]) for token, row in zip(ids, rows, strict=True)]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    tops = [{_name(t, p): p.logprob for t, p in row.items()} for row in rows]
    return {
        "tokens": tokens,
        "token_logprobs": [row[token].logprob for token, row in zip(ids, rows, strict=True)],
        "top_logprobs": tops if count else [None] * len(tokens),
        "text_offset": offsets,
    }


def chat_logprobs(ids: Sequence[int], rows: Rows, count: int) -> dict[str, Any]:
    """The form of /v1/chat/completions."""
    content = []
    for token, row in zip(ids, rows, strict=True):
        best = sorted(row.items(), key=lambda item: item[1].rank)[:count]
        content.append(_entry(token, row[token]) | {"top_logprobs": [_entry(*one) for one in best]})
    return {"content": content}


def _entry(token: int, found: Logprob) -> dict[str, Any]:
    text = _name(token, found)
    return {"token": text, "logprob": found.logprob, "bytes": list(text.encode(errors="replace"))}
