"""`Generation`: the prompts of one HTTP request on their way through the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

from starlette.requests import Request

from depthprune_runtime.engine.async_engine import RequestStream
from depthprune_runtime.engine.errors import EngineDead
from depthprune_runtime.engine.outputs import OutputDelta, RequestOutput
from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.prompts import Prompt
from depthprune_runtime.server.errors import ApiError
from depthprune_runtime.server.served import Served

_T = TypeVar("_T")
_News = tuple[int, OutputDelta | EngineDead]


class Generation:
    """Queued prompts, all with the same parameters. `start` makes one."""

    def __init__(self, served: Served, streams: Sequence[RequestStream], params: SamplingParams) -> None:
        self.params = params
        self.streams = streams
        self._clocks = [served.metrics.clock() for _ in streams]

    @classmethod
    async def start(
        cls, served: Served, prompts: Sequence[Prompt], params: SamplingParams, priority: int | None = None
    ) -> Generation:
        """Queue all prompts or none; raises what `AsyncEngine.submit` does."""
        streams: list[RequestStream] = []
        try:
            for prompt in prompts:
                streams.append(await served.engine.submit(prompt, params, priority=priority or 0))
        except BaseException:
            for stream in streams:
                stream.abort()
            raise
        return cls(served, streams, params)

    def abort(self) -> None:
        """End what still runs."""
        for stream in self.streams:
            stream.abort()

    async def deltas(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """(number of the prompt, delta) as they come. Raises ApiError for an output that fails, EngineDead."""
        news: asyncio.Queue[_News] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(news, i, stream)) for i, stream in enumerate(self.streams)]
        left = len(tasks)
        try:
            while left:
                number, delta = await news.get()
                if isinstance(delta, EngineDead):
                    raise delta
                self._clocks[number].saw(delta)
                if delta.error is not None:
                    raise ApiError(400 if self.params.adjusts else 500, delta.error)
                left -= delta.finished
                yield number, delta
        finally:
            for task in tasks:
                task.cancel()
            self.abort()

    async def results(self) -> list[RequestOutput]:
        """All of it, in the order of the prompts."""
        found: dict[int, RequestOutput] = {}
        async for number, delta in self.deltas():
            if delta.result is not None:
                found[number] = delta.result
        return [found[number] for number in range(len(self.streams))]


async def _pump(news: asyncio.Queue[_News], number: int, stream: RequestStream) -> None:
    try:
        async for delta in stream:
            news.put_nowait((number, delta))
    except EngineDead as error:
        news.put_nowait((number, error))


async def unless_gone(request: Request, work: asyncio.Task[_T]) -> _T | None:
    """What `work` gives; None, and `work` cancelled, if the client goes away before. The body must have been read."""
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        gone.cancel()
        work.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
