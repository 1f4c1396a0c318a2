"""A gateway without a network: ASGI calls from the test, and a server made of queues that answers with a given text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from edge_runtime.gateway.app import make_app
from edge_runtime.gateway.device import GatewayDevice, Speculation
from edge_runtime.gateway.parameters import Limits
from edge_runtime.gateway.service import Gateway
from edge_runtime.gateway.sessions import Sessions
from edge_runtime.tokenizer import Tokenizer
from tests.edge_fakes import QueueTransport
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Close, Commit, Draft, Open, Origin, Status
from wisp_plugin.wire_values import named_slo

T = TypeVar("T")
LIMIT_S = 20.0
TEXT = "the quick brown 🙂 fox"
CHAT = [{"role": "user", "content": "hi"}]
MAX_TOTAL_TOKENS = 256


class FakeServer:
    """Answers every session with `text`, `size` tokens per commit. With `holds` only when `release` is called."""

    def __init__(self, tokenizer: Tokenizer, text: str = "the quick brown fox", size: int = 2) -> None:
        self.tokens = [*tokenizer.encode(text, False).tolist(), tokenizer.eos_token_ids[0]]
        self.size, self.holds = size, False
        self.status: Status | None = None  # answer every open with this alone
        self.error: Exception | None = None  # raise this from every open
        self.transports: list[FakeTransport] = []

    def connect(self) -> FakeTransport:
        transport = FakeTransport(self)
        self.transports.append(transport)
        return transport

    @property
    def opens(self) -> list[Open]:
        return [m for t in self.transports for m in t.log if isinstance(m, Open)]

    @property
    def closes(self) -> list[Close]:
        return [m for t in self.transports for m in t.log if isinstance(m, Close)]

    @property
    def drafts(self) -> list[Draft]:
        return [m for t in self.transports for m in t.drafts]

    def release(self, num_commits: int = 1000) -> None:
        for transport in self.transports:
            transport.release(num_commits)

    def commits(self, opened: Open) -> list[Commit]:
        """The whole answer to `opened`."""
        if self.status is not None:
            nothing, retry = np.zeros(0, np.int32), 100 if self.status is Status.OVERLOADED else None
            return [Commit(opened.session, 0, nothing, nothing.astype(np.uint8), self.status, retry_after_ms=retry)]
        done = len(opened.tokens) - opened.prompt_len
        tokens = np.array(self.tokens[done : opened.max_new_tokens], np.int32)
        last = Status.EOS if opened.max_new_tokens >= len(self.tokens) else Status.LENGTH
        commits = []
        for at in range(0, len(tokens), self.size):
            part = tokens[at : at + self.size]
            status = last if at + self.size >= len(tokens) else Status.RUNNING
            logprobs = np.full(len(part), -0.5, np.float32) if opened.logprobs else None
            origin = np.full(len(part), Origin.DECODED, np.uint8)
            commits.append(
                Commit(opened.session, len(opened.tokens) + at, part, origin, status, logprobs=logprobs)
            )
        return commits


class FakeTransport(QueueTransport):
    """One session's way to a `FakeServer`."""

    def __init__(self, server: FakeServer) -> None:
        super().__init__()
        self._server = server
        self._held: list[Commit] = []

    def open(self, message: Open) -> None:
        super().open(message)
        if self._server.error is not None:
            raise self._server.error
        self._held = self._server.commits(message)
        if not self._server.holds:
            self.release(len(self._held))

    def send(self, message: Draft | Close) -> None:
        super().send(message)
        if isinstance(message, Close):
            nothing = np.zeros(0, np.int32)
            self.inbox.put(Commit(message.session, 0, nothing, nothing.astype(np.uint8), Status.CLOSED))

    def release(self, num_commits: int) -> None:
        for commit in self._held[:num_commits]:
            self.inbox.put(commit)
        del self._held[:num_commits]


@dataclass
class Reply:
    """What an ASGI application sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of every server-sent event but [DONE]."""
        lines = [line.removeprefix(b"data: ") for line in self.body.split(b"\n\n") if line.startswith(b"data: ")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]


class House:
    """A gateway to call."""

    def __init__(self, tokenizer: Tokenizer, server: FakeServer, **options: Any) -> None:
        speculation: Speculation | None = options.pop("speculation", None)
        self.server = server
        self.device = GatewayDevice(
            tokenizer=tokenizer,
            limits=Limits(tokenizer.vocab_size, MAX_TOTAL_TOKENS),
            slo=named_slo(),
            connect=server.connect,
            is_ready=lambda: server.error is None,
            model_id="tiny",
            speculation=speculation,
            server_wait_s=options.pop("server_wait_s", 0.3),
        )
        self.sessions = Sessions(self.device, options.pop("max_sessions", 8), options.pop("max_requests", 16))
        self.gateway = Gateway(self.device, self.sessions)
        self._app = make_app(self.gateway)
        assert not options, options

    async def get(self, path: str) -> Reply:
        return await self.call("GET", path, b"")

    async def post(self, path: str, body: Any, **options: Any) -> Reply:
        return await self.call("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), **options)

    async def call(
        self, method: str, path: str, body: bytes, leaves: Callable[[Reply], bool] = lambda reply: False
    ) -> Reply:
        """One request; the client hangs up as soon as `leaves` holds."""
        reply, is_sent = Reply(), False

        async def receive() -> Mapping[str, Any]:
            nonlocal is_sent
            if not is_sent:
                is_sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            while not leaves(reply):
                await asyncio.sleep(0.002)
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif message.get("body"):
                reply.chunks.append(message["body"])

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [], "scheme": "http",
            "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        await asyncio.wait_for(self._app(scope, receive, send), LIMIT_S)
        return reply

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.002)


def run(tokenizer: Tokenizer, server: FakeServer, use: Callable[[House], Awaitable[T]], **options: Any) -> T:
    """`use` of a house in an event loop; at the end no session is left."""

    async def main() -> T:
        house = House(tokenizer, server, **options)
        try:
            result = await use(house)
            await house.until(lambda: not house.sessions.running)
            assert house.sessions.num_requests == 0
            assert all(transport.is_closed for transport in server.transports)
            return result
        finally:
            await house.sessions.close()

    return asyncio.run(main())


LOST = TransportError("no server at HERE")


def post(tokenizer: Tokenizer, server: FakeServer, path: str, body: Any, **options: Any) -> Reply:
    return run(tokenizer, server, lambda house: house.post(path, body), **options)


def generate(tokenizer: Tokenizer, server: FakeServer, path: str = "/generate", **parameters: Any) -> Reply:
    return post(tokenizer, server, path, {"inputs": "hello", "parameters": parameters})
