"""`ServerOptions`: where a server listens, whom it answers and how much it takes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from depthprune_runtime.errors import InputError
from depthprune_runtime.host.sizes import size_in_bytes
from depthprune_runtime.options import flag

_MOST_SECONDS = 86400


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server. Values out of range are refused with InputError.

    Args:
        host: address to listen at; by default this machine alone can connect.
        port: 0 to 65535; 0 takes a free one.
        uds: path of a Unix socket, in place of host and port.
        model_names: what clients call the model; by default the name of its file.
        api_keys: any of them must come with a request as `Authorization: Bearer KEY`; none: everybody is answered.
        cors_origins: origins of web pages that browsers let read the answers; `*` is any.
        max_body: bytes of a request's body at most, as a number or as text such as "4MiB".
        drain_seconds: how long a server that is told to end waits for what runs, 0 to 86400.
    """

    host: str = field(default="127.0.0.1", metadata=flag("address to listen at (default: this machine alone)"))
    port: int = field(default=8000, metadata=flag("port to listen at; 0 takes a free one (default 8000)"))
    uds: str | None = field(default=None, metadata=flag("Unix socket, in place of a port", metavar="PATH"))
    model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    max_body: int | str = field(default=4 << 20, metadata=flag("largest body of a request (default 4MiB)", metavar="N"))
    drain_seconds: int = field(
        default=30, metadata=flag("how long SIGTERM waits for what runs (default 30)", metavar="SECONDS")
    )

    def __post_init__(self) -> None:
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port < 65536:
            raise InputError(f"port: expected an integer from 0 to 65535, got {self.port!r}")
        for name in ("model_names", "api_keys", "cors_origins"):
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(one, str) and one for one in given):
                raise InputError(f"{name}: expected non-empty strings")
            object.__setattr__(self, name, tuple(given))
        if not all(key.isascii() and key.isprintable() for key in self.api_keys):
            raise InputError("api_keys: expected printable ASCII characters")
        size = size_in_bytes(self.max_body) if isinstance(self.max_body, str) else self.max_body
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"max_body: expected bytes, such as 4194304 or 4MiB, got {self.max_body!r}")
        object.__setattr__(self, "max_body", size)
        drain = self.drain_seconds
        if isinstance(drain, bool) or not isinstance(drain, int) or not 0 <= drain <= _MOST_SECONDS:
            raise InputError(f"drain_seconds: expected an integer from 0 to {_MOST_SECONDS}, got {drain!r}")

    @property
    def most_bytes(self) -> int:
        """`max_body` as a number."""
        return int(self.max_body)
