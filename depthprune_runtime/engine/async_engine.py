"""`AsyncEngine`: an `Engine` for many concurrent callers. A thread of its own steps it.

    engine = AsyncEngine(Runtime.load("pruned.safetensors").engine())
    async for delta in engine.generate("Once upon a time", SamplingParams(max_tokens=32)):
        print(delta.text, end="")
    await engine.close()

Callers talk to the thread through an inbox that it empties between steps, so nothing of theirs waits for a lock; the
deltas of a step go to each event loop in one call.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any

from depthprune_runtime.engine.engine import Engine
from depthprune_runtime.engine.errors import EngineDead
from depthprune_runtime.engine.inputs import RequestGroup
from depthprune_runtime.engine.outputs import EngineStats, OutputDelta
from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.process import Process
from depthprune_runtime.engine.prompts import Prompt

_Loop = asyncio.AbstractEventLoop
_News = OutputDelta | BaseException


class RequestStream:
    """Deltas of one accepted request, an async iterator. Leaving it before its end (`aclose`) aborts the request."""

    def __init__(self, engine: AsyncEngine, request_id: str, loop: _Loop) -> None:
        self.request_id = request_id
        self._engine = engine
        self._loop = loop
        self._news: asyncio.Queue[_News] = asyncio.Queue()
        self._ended = False

    @property
    def loop(self) -> _Loop:
        return self._loop

    def put(self, news: _News) -> None:
        """Called in the stream's event loop."""
        self._news.put_nowait(news)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> OutputDelta:
        if self._ended:
            raise StopAsyncIteration
        try:
            news = await self._news.get()
        except asyncio.CancelledError:  # the consumer is gone
            self.abort()
            raise
        if isinstance(news, BaseException):
            self._ended = True
            raise news
        self._ended = news.finished
        return news

    def abort(self) -> None:
        """End the request if it still runs, and the stream with it; does not wait."""
        if not self._ended:
            self._ended = True
            self._engine.drop(self)

    async def aclose(self) -> None:
        self.abort()


class AsyncEngine:
    """Owns `engine` and its thread from here on; `generate`, `submit`, `abort` and `stats` may be called from anywhere.

    An exception of the engine ends every stream with `EngineDead` from it, and refuses what comes later alike.

    Args:
        engine: with no requests yet; nobody else may use it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}  # the thread's own, as the engine is
        self._gate = threading.Lock()  # guards _dead against calls that would never be answered
        self._dead: EngineDead | None = None
        self._closing = False
        self._process = Process("the AsyncEngine")
        self._thread = threading.Thread(target=self._run, name="depthprune-engine", daemon=True)
        self._thread.start()

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Queue a prompt. Refusals are raised here, before any output.

        Args:
            prompt: as in `Engine.add_request`.
            sampling_params: as in `Engine.add_request`.
            request_id: as in `Engine.add_request`.
            priority: as in `Engine.add_request`.

        Returns:
            The deltas as an async iterator.

        Raises:
            InputError: for what can never run, and behind a fork.
            EngineFull: when `max_waiting` is reached.
            EngineDead: once the engine has stopped or is closing.
        """
        await self.check_health()
        loop = asyncio.get_running_loop()
        group = await asyncio.to_thread(self._engine.prepare, prompt, sampling_params, request_id, priority)
        stream = RequestStream(self, group.request_id, loop)
        accepted = self._call(lambda: self._add(group, stream))
        try:
            await asyncio.wrap_future(accepted)
        except asyncio.CancelledError:
            self.drop(stream)
            raise
        return stream

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[OutputDelta, None]:
        """Deltas of one prompt until its end. Cancelling or leaving the iteration aborts the request.

        Args:
            prompt: as in `submit`.
            sampling_params: as in `submit`.
            request_id: as in `submit`.
            priority: as in `submit`.

        Returns:
            The deltas as an async generator.

        Raises:
            InputError: as in `submit`, at the first delta.
            EngineFull: likewise.
            EngineDead: likewise, and at any delta once the engine has stopped.
        """
        stream = await self.submit(prompt, sampling_params, request_id, priority)
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.abort()

    async def abort(self, request_id: str) -> bool:
        """End a request; its stream ends with finish_reason "abort".

        Args:
            request_id: of the request.

        Returns:
            False if it is unknown or has ended.

        Raises:
            InputError: behind a fork.
            EngineDead: once the engine has stopped.
        """
        return bool(await asyncio.wrap_future(self._call(lambda: self._engine.abort(request_id))))

    async def stats(self) -> EngineStats:
        """State and totals of the engine, between two of its steps. EngineDead once it has stopped."""
        return await asyncio.wrap_future(self._call(self._engine.stats))

    def drop(self, stream: RequestStream) -> None:
        """Abort a request that nobody listens to any more; does not wait.

        Args:
            stream: of the request. One that has ended is left as it is.
        """

        def leave() -> None:
            if self._streams.get(stream.request_id) is stream:
                del self._streams[stream.request_id]
                self._engine.abort(stream.request_id)

        with self._gate:
            if self._dead is None:
                self._inbox.put(leave)

    @property
    def errored(self) -> EngineDead | None:
        """Why nothing more is accepted; None while all is well."""
        return self._dead

    async def check_health(self) -> None:
        """Raise EngineDead once the engine has stopped, from the exception that stopped it. Does not wait for it."""
        if self._dead is not None:
            raise EngineDead(str(self._dead)) from self._dead.__cause__
        self._process.check_thread()

    async def close(self, drain: bool = False) -> None:
        """Stop, and free the KV cache; accepts nothing new meanwhile.

        Args:
            drain: let requests finish, rather than end them with finish_reason "abort".

        Raises:
            InputError: behind a fork.
        """
        await asyncio.to_thread(self.shutdown, drain)

    def shutdown(self, drain: bool = False) -> None:
        """`close` for callers without an event loop; returns when the thread has ended.

        Args:
            drain: as in `close`.

        Raises:
            InputError: behind a fork.
        """
        self._process.check_thread()
        with self._gate:
            if self._dead is None:
                self._inbox.put(lambda: self._begin_closing(drain))
        self._thread.join()

    # ---- in the engine's thread ----

    def _call(self, function: Callable[[], Any]) -> Future[Any]:
        """Have the thread run `function` between two steps. (This method itself runs in the caller's thread.)"""
        future: Future[Any] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._process.check_thread()
        with self._gate:
            if self._dead is not None:
                raise EngineDead(str(self._dead)) from self._dead.__cause__
            self._inbox.put(answer)
        return future

    def _add(self, group: RequestGroup, stream: RequestStream) -> None:
        if self._closing:
            raise EngineDead("the engine is closing; make a new one")
        self._streams[self._engine.add(group)] = stream

    def _begin_closing(self, drain: bool) -> None:
        self._closing = True
        if not drain:
            for request_id in list(self._streams):
                self._engine.abort(request_id)

    def _run(self) -> None:
        cause: BaseException | None = None
        try:
            while not self._closing or self._engine.has_unfinished():
                self._read_inbox(wait=not self._engine.has_unfinished())
                if self._engine.has_unfinished():
                    self._deliver(self._engine.step())
        except BaseException as error:
            cause = error
        with self._gate:  # from here on nothing enters the inbox
            self._dead = EngineDead("the engine was closed" if cause is None else f"the engine has stopped: {cause!r}")
            self._dead.__cause__ = cause
        self._engine.close()
        left, self._streams = self._streams, {}
        for stream in left.values():
            self._post(stream.loop, [(stream, self._dead)])
        self._read_inbox(wait=False)  # the engine answers each with EngineDead

    def _read_inbox(self, wait: bool) -> None:
        while True:
            try:
                self._inbox.get(block=wait)()
            except queue.Empty:
                return
            wait = False

    def _deliver(self, deltas: list[OutputDelta]) -> None:
        batches: dict[_Loop, list[tuple[RequestStream, _News]]] = {}
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue
            if delta.finished:
                del self._streams[delta.request_id]
            batches.setdefault(stream.loop, []).append((stream, delta))
        for loop, batch in batches.items():
            self._post(loop, batch)

    def _post(self, loop: _Loop, batch: list[tuple[RequestStream, _News]]) -> None:
        def put() -> None:
            for stream, news in batch:
                stream.put(news)

        try:
            loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed: nobody listens
            for stream, _ in batch:
                if self._streams.pop(stream.request_id, None) is not None:
                    self._engine.abort(stream.request_id)
