"""Bodies of requests: read as far as they may go, parsed, and their fields checked. Nothing here knows a model."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request

from depthprune_runtime.engine.values import boolean, refuse
from depthprune_runtime.server.errors import ApiError

Body = dict[str, Any]


async def read_body(request: Request, most: int) -> Body:
    """The JSON object of a request.

    Args:
        request: not read yet.
        most: bytes at most.

    Returns:
        The object.

    Raises:
        ApiError: 413 for more bytes, 400 for what is no JSON object.
    """
    refusal = ApiError(413, f"body: expected at most {most} bytes; send less")
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdigit() and (len(stated) > 18 or int(stated) > most):
        raise refusal
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise refusal
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"body: expected JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"body: expected a JSON object, got {type(body).__name__}")
    return body


def flag(body: Body, name: str, default: bool = False) -> bool:
    """A field that is true or false; null is as if it were missing."""
    value = body.get(name)
    return default if value is None else boolean(name, value)


def text(body: Body, name: str) -> str | None:
    """A field that is text, or missing."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        refuse(name, "a string", value)
    return value


def entry(body: Body, name: str) -> Body:
    """A field that is an object; a missing one is empty."""
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        refuse(name, "an object", value)
    return value or {}
