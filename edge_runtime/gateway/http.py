"""HTTP as the routes need it: bodies with a bound, server-sent events, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from edge_runtime.gateway.errors import Refusal

T = TypeVar("T")
MAX_BODY_BYTES = 2_000_000  # as TGI's --payload-limit
BODY_S = 30.0  # for a client to send its body
KEEPALIVE_S = 15.0  # of silence before a comment tells proxies that the stream is alive
DONE = b"data: [DONE]\n\n"
_KEEPALIVE = b": still there\n\n"


class HungUp(Exception):
    """The client has closed its connection."""


class Caller:
    """The client of one request: its body, and word of its hanging up. `close` must follow."""

    def __init__(self, request: Request) -> None:
        self.path_params = request.path_params
        self._receive = request.receive
        self._watcher: asyncio.Task[None] | None = None

    async def read_body(self) -> bytes:
        """The whole body. Refusal 413 if it is too long, 408 if it does not come. HungUp if the client goes."""
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise HungUp
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise Refusal(413, "validation", f"the body is too long; allowed: {MAX_BODY_BYTES} bytes")
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise Refusal(408, "validation", f"the body did not arrive within {BODY_S:g} s") from None

    async def until_hangup(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the client hangs up: then HungUp. Behind `read_body`."""
        task = asyncio.ensure_future(work)
        try:
            await self.wait(task)
            return task.result()
        finally:
            await cancelled(task)

    async def wait(self, task: asyncio.Future[Any], limit_s: float | None = None) -> bool:
        """Whether `task` is done, within `limit_s`. Raises HungUp."""
        if self._watcher is None:
            self._watcher = asyncio.ensure_future(self._watch())
        await asyncio.wait((task, self._watcher), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and self._watcher.done():
            raise HungUp
        return task.done()

    async def close(self) -> None:
        """Look no more."""
        if self._watcher is not None:
            await cancelled(self._watcher)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel `task` if it is not done, and wait for its end."""
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def event(value: Any) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


class EventStream:
    """An ASGI response of server-sent events.

    `close` is awaited at the end, and at once when the client hangs up: then `on_hangup` is called before.
    """

    def __init__(
        self,
        caller: Caller,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        close: Callable[[], Awaitable[None]],
        on_hangup: Callable[[], None],
        first: bytes = b"",
    ) -> None:
        """`first` goes out with the headers, before `events`."""
        self._caller, self._events, self._close, self._on_hangup = caller, events, close, on_hangup
        self._first = first
        fixed = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
        self._headers = [(name.encode(), value.encode()) for name, value in (fixed | dict(headers)).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            await self._pump(send)
        except HungUp:
            self._on_hangup()
        finally:
            await self._events.aclose()
            await self._close()
            await self._caller.close()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        is_over = False
        while not is_over:
            pending = asyncio.ensure_future(anext(self._events, None))
            try:
                while not await self._caller.wait(pending, KEEPALIVE_S):
                    await send({"type": "http.response.body", "body": _KEEPALIVE, "more_body": True})
                chunk = pending.result()
            finally:
                await cancelled(pending)
            is_over = chunk is None
            await send({"type": "http.response.body", "body": chunk or b"", "more_body": not is_over})
