"""Run the application: its socket, its signals, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from depthprune_runtime.errors import InputError
from depthprune_runtime.server.options import ServerOptions

_BACKLOG = 2048
_GRACE_SECONDS = 10  # for clients to read the end of an answer that was aborted
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """Ends with its own status where a signal ends it; tells when it listens.

    After `drain_seconds` the engine aborts what still runs, so that every answer has an end that its client can read.
    """

    def __init__(self, app: Starlette, drain_seconds: int, told: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=drain_seconds + _GRACE_SECONDS,
            backlog=_BACKLOG,
            server_header=False,
        )
        super().__init__(config)
        self._app = app
        self._drain_seconds = drain_seconds
        self._told = told

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._told()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        limit = asyncio.create_task(self._abort_late())
        await super().shutdown(sockets)
        limit.cancel()

    async def _abort_late(self) -> None:
        await asyncio.sleep(self._drain_seconds)
        await self._app.state.served.engine.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(options: ServerOptions) -> tuple[socket.socket, str]:
    """The bound socket and its address for people."""
    if options.uds is not None:
        bound = socket.socket(socket.AF_UNIX)
        address: str | tuple[str, int] = options.uds
        shown = options.uds
    else:
        bound = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = (options.host, options.port)
        shown = f"{options.host}:{options.port}"
    try:
        bound.bind(address)
    except (OSError, ValueError) as error:
        bound.close()
        raise InputError(f"{shown}: cannot listen there: {error}; choose another --host, --port or --uds") from error
    if options.uds is not None:
        return bound, f"unix:{options.uds}"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return bound, f"http://{host}:{bound.getsockname()[1]}"


def serve(make: Callable[[], Starlette], options: ServerOptions, told: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; then wait for what runs, at most `drain_seconds`.

    Args:
        make: the application; called once the address is known to be free, for a model takes long to load.
        options: where to listen.
        told: called with the address once the server listens.

    Raises:
        InputError: for an address that cannot be had.
    """
    bound, address = _listen(options)
    try:
        _Server(make(), options.drain_seconds, lambda: told(address)).run(sockets=[bound])
    finally:
        bound.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)
