"""Streams against a gateway, many in one event loop: HTTP/1.1 by hand, so that the client costs little itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

_LINE_BYTES = 1 << 20


@dataclass(slots=True)
class StreamResult:
    """What one stream of /generate_stream brought; times are those of `time.monotonic`, `sent_s` before connecting."""

    sent_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    status: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    last: dict[str, Any] | None = None  # the final event
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Address:
    """Where a gateway listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Address:
        """Of http://HOST:PORT."""
        host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
        return cls(host, int(port))


async def request(where: Address, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of one request."""
    reader, writer = await asyncio.open_connection(where.host, where.port, limit=_LINE_BYTES)
    try:
        writer.write(_head(where, method, path, body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        return int(head.split(None, 2)[1]), await _content(reader, head)
    finally:
        writer.close()


async def stream(
    where: Address, inputs: str, parameters: dict[str, Any], on_token: Callable[[], None] = lambda: None
) -> StreamResult:
    """One stream to its end; `on_token` is called for every token."""
    body = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    result = StreamResult(sent_s=time.monotonic())
    reader, writer = await asyncio.open_connection(where.host, where.port, limit=_LINE_BYTES)
    try:
        writer.write(_head(where, "POST", "/generate_stream", body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        result.status = int(head.split(None, 2)[1])
        if result.status != 200:
            result.error = (await _content(reader, head)).decode()
            return result
        async for event in _events(reader):
            _take(result, event, on_token)
    finally:
        writer.close()
    return result


def _take(result: StreamResult, event: dict[str, Any], on_token: Callable[[], None]) -> None:
    result.last_s = time.monotonic()
    result.first_s = result.first_s or result.last_s
    if "error" in event:
        result.error = str(event["error"])
        return
    assert event["index"] == len(result.token_ids) + 1, "a token was lost or came twice"
    result.token_ids.append(event["token"]["id"])
    result.text += event["token"]["text"]
    if event["details"] is not None:
        result.last = event
    on_token()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Events of a chunked response."""
    pending = b""
    while size := int(await reader.readline(), 16):
        pending += await reader.readexactly(size)
        await reader.readexactly(2)
        *whole, pending = pending.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                yield json.loads(event[5:])


def _head(where: Address, method: str, path: str, body: bytes) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        f"host: {where.host}:{where.port}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _content(reader: asyncio.StreamReader, head: bytes) -> bytes:
    if b"transfer-encoding: chunked" not in head.lower():
        return await reader.read()
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    return b"".join(parts)
