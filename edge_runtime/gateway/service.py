"""What every route of the gateway does: check, run a session, answer or stream, and count how it ended.

A session is left, and so freed on device and server, when its text ends, when it fails, and when its client hangs up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_runtime.gateway.device import GatewayDevice
from edge_runtime.gateway.errors import Refusal, defect
from edge_runtime.gateway.generation import Generation, Times, Token
from edge_runtime.gateway.http import Caller, EventStream, HungUp, to_json
from edge_runtime.gateway.metrics import FAILURES, GatewayMetrics
from edge_runtime.gateway.parameters import GenerationRequest, json_object
from edge_runtime.gateway.sessions import Sessions

log = logging.getLogger(__name__)
T = TypeVar("T")
COMPUTE_TYPE = "cpu+wisp"
SHORT_BODY_BYTES = 16_384  # a longer one is tokenized beside the event loop
HEALTH_S = 1.0  # how long an answer about the server's health holds
_HUNG_UP = 499  # nobody reads it; the usual code for the log


@dataclass(slots=True)
class Gateway:
    """Everything behind the routes."""

    device: GatewayDevice
    sessions: Sessions
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    _health: tuple[float, bool] = (-HEALTH_S, False)
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def is_healthy(self) -> bool:
        """Whether the server's model is ready; asked at most once in `HEALTH_S`."""
        async with self._asking:
            asked_s, healthy = self._health
            if time.monotonic() - asked_s >= HEALTH_S:
                healthy = await asyncio.to_thread(self.device.is_ready)
                self._health = time.monotonic(), healthy
            return healthy

    async def parsed(self, caller: Caller, parse: Callable[[dict[str, Any]], T]) -> T:
        """The checked body of a request."""
        body = await caller.read_body()
        if len(body) > SHORT_BODY_BYTES:
            return await asyncio.to_thread(lambda: parse(json_object(body)))
        return parse(json_object(body))

    @contextlib.asynccontextmanager
    async def session(self, caller: Caller, wanted: GenerationRequest, times: Times) -> AsyncIterator[Generation]:
        """The session of a request; left at the end of the block."""
        times.validated_s = time.monotonic()
        start = self.sessions.start(wanted, times)
        generation = await (start if self.sessions.has_room else caller.until_hangup(start))
        self.metrics.on_request(generation)
        try:
            yield generation
        finally:
            self.sessions.leave(generation)
            self.metrics.on_end(generation)

    async def whole(
        self, caller: Caller, wanted: GenerationRequest, times: Times
    ) -> tuple[Generation, list[Token], str]:
        """All tokens of a request, and its text."""

        async def collect(generation: Generation) -> tuple[list[Token], str]:
            tokens: list[Token] = []
            tail = ""
            async for batch in generation:
                tokens += batch.tokens
                tail = batch.tail
            return tokens, "".join(token.text for token in tokens) + tail

        async with self.session(caller, wanted, times) as generation:
            tokens, text = await caller.until_hangup(collect(generation))
        return generation, tokens, text

    async def stream(
        self,
        caller: Caller,
        wanted: GenerationRequest,
        times: Times,
        events: Callable[[Generation], AsyncGenerator[bytes, None]],
        failed: Callable[[Refusal], bytes],
    ) -> EventStream:
        """A response of `events`. What fails before the first one is a Refusal, later an event of `failed`."""
        async with contextlib.AsyncExitStack() as stack:
            generation = await stack.enter_async_context(self.session(caller, wanted, times))
            inner = await stack.enter_async_context(contextlib.aclosing(events(generation)))
            first = await caller.until_hangup(anext(inner))
            rest = stack.pop_all()  # from here on the response closes it

        async def body() -> AsyncGenerator[bytes, None]:
            try:
                async for chunk in inner:
                    yield chunk
            except Refusal as refusal:
                self.count(refusal.error_type)
                yield failed(refusal)

        headers = {"x-compute-type": COMPUTE_TYPE, "x-compute-characters": str(len(wanted.prompt_text))}
        return EventStream(caller, body(), headers, rest.aclose, self.on_hangup, first)

    def on_hangup(self) -> None:
        """The client of a stream has gone."""
        self.count("hangup")

    def count(self, failure: str) -> None:
        """A request failed."""
        self.metrics.failures.add(1, failure if failure in FAILURES else "internal")


Answer = Response | EventStream
Endpoint = Callable[[Gateway, Caller, Times], Awaitable[Answer]]


def guarded(gateway: Gateway, endpoint: Endpoint, shape: Callable[[Refusal], dict[str, Any]]) -> Any:
    """`endpoint` as a route: every Refusal is an answer of `shape`, and what it is is counted."""

    async def route(request: Request) -> Answer:
        asks_for_text = request.method == "POST"
        gateway.metrics.requests.add(asks_for_text)
        caller, answer = Caller(request), None
        try:
            answer = await endpoint(gateway, caller, Times(time.monotonic()))
            return answer
        except Refusal as refusal:
            if asks_for_text:
                gateway.count(refusal.error_type)
            return JSONResponse(shape(refusal), refusal.status, refusal.headers)
        except HungUp:
            gateway.count("hangup")
            return Response(status_code=_HUNG_UP)
        except Exception:
            gateway.count("internal")
            log.exception("a request failed")
            return JSONResponse(shape(defect()), 500)
        finally:
            if not isinstance(answer, EventStream):
                await caller.close()

    return route


def work_headers(generation: Generation) -> dict[str, str]:
    """TGI's headers about the work behind an answer; seconds for compute, milliseconds for the rest."""
    times = generation.times
    total_s, inference_s = times.ended_s - times.arrived_s, times.ended_s - times.started_s
    in_ms = {
        "total-time": total_s,
        "validation-time": times.validated_s - times.arrived_s,
        "queue-time": times.started_s - times.validated_s,
        "inference-time": inference_s,
        "time-per-token": inference_s / max(1, generation.num_tokens),
    }
    return {
        "x-compute-type": COMPUTE_TYPE,
        "x-compute-time": f"{total_s:.6f}",
        "x-compute-characters": str(len(generation.request.prompt_text)),
        "x-prompt-tokens": str(len(generation.request.prompt)),
        "x-generated-tokens": str(generation.num_tokens),
        **{f"x-{name}": str(round(1e3 * seconds)) for name, seconds in in_ms.items()},
    }


def json_answer(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """`value` as the body of an answer."""
    return Response(to_json(value), media_type="application/json", headers=headers)
