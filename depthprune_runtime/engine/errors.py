"""Refusals of an engine that are not the request's fault. Imports no torch."""

from __future__ import annotations


class EngineFull(RuntimeError):  # noqa: N818  a state, told to clients as "try again later"
    """The waiting queue is at its limit: try again later."""


class EngineDead(RuntimeError):  # noqa: N818
    """The engine was closed, or stopped at the exception that is this one's `__cause__`."""
