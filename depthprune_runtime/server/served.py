"""`Served`: what all routes share: the engine, its model and the counters."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from depthprune_runtime.engine.async_engine import AsyncEngine
from depthprune_runtime.engine.inputs import Inputs
from depthprune_runtime.server.bodies import Body, read_body, text
from depthprune_runtime.server.errors import ApiError
from depthprune_runtime.server.metrics import Metrics
from depthprune_runtime.server.options import ServerOptions


@dataclass(frozen=True)
class Served:
    """A running engine and how it is served. names: of the model, the first is what answers say; created: when."""

    engine: AsyncEngine
    inputs: Inputs
    options: ServerOptions
    metrics: Metrics
    names: tuple[str, ...]
    created: int
    version: str

    def check_model(self, body: Body) -> str:
        """The name that a body calls the model by; ApiError 404 for another model's."""
        name = text(body, "model") or self.names[0]
        if name not in self.names:
            raise ApiError(404, f"model: expected {' or '.join(self.names)}, got {name[:200]!r}", "model")
        return name

    async def body(self, request: Request) -> Body:
        """The JSON object of a request, read as far as it may go."""
        return await read_body(request, self.options.most_bytes)


def served(request: Request) -> Served:
    """What the application of `request` serves."""
    found: Served = request.app.state.served
    return found
