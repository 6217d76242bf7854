"""Refusals in the form of OpenAI's API: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

from depthprune_runtime.engine.errors import EngineDead, EngineFull
from depthprune_runtime.errors import InputError

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}


class ApiError(Exception):
    """A refusal with its HTTP status. param: the field that is wrong, where it is known."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param

    def to_json(self) -> dict[str, Any]:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of `error`. What is none of ours is raised again."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        message = str(error)
        name = message.partition(":")[0]
        return ApiError(400, message, name if name.isidentifier() else None)
    if isinstance(error, EngineFull | EngineDead):
        return ApiError(503, str(error))
    raise error
