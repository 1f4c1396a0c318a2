"""Between Triton's Python backend and the engines: with `pb_generate` the only importer of its module."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import triton_python_backend_utils as pb_utils

from triton_models.watcher import Watcher
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import Close, Commit, Draft, Open
from wisp_plugin.metrics import Kind
from wisp_plugin.protocols import Reply
from wisp_plugin.telemetry import Telemetry
from wisp_plugin.unary_engine import Answer, UnaryEngine
from wisp_plugin.unary_wire import VerifyRequest, decode_verify, encode_answer
from wisp_plugin.wire import UNAVAILABLE, WireLimits, decode_request, encode_commit
from wisp_plugin.wire_values import Array, is_anonymous

PUBLISH_PERIOD_S = 1.0  # of gauges and histograms
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

log = logging.getLogger(__name__)


def log_to_triton() -> None:
    """What Python's `logging` is told goes to Triton's log. To be called once, when a model is loaded."""
    logging.basicConfig(level=logging.INFO, handlers=[TritonLogHandler()], format="%(message)s")


class ResponseStream:
    """The response sender of a decoupled request: responses, then exactly one end; and whether its client has left."""

    def __init__(self, request: Any, watcher: Watcher) -> None:
        self._sender = request.get_response_sender()
        self._watcher = watcher
        self._cancelled: bool | None = None  # None: nobody has asked yet
        # Triton frees what a question is about when the final flag comes: never ask during or after it.
        self._lock = threading.Lock()
        self._ended = False

    def send_tensors(self, tensors: Mapping[str, Array]) -> None:
        """One response of several."""
        self._sender.send(make_response(tensors))

    def end(self, response: Any) -> None:
        """Send `response` (None: no response at the client) as the last one."""
        self._watcher.discard(self)
        with self._lock:
            self._ended = True
        self._sender.send(response, flags=_FINAL)

    def is_cancelled(self) -> bool:
        """True if the client had left or cancelled when the watcher last asked."""
        if self._cancelled is None:
            self._cancelled = False
            self._watcher.add(self)
        return self._cancelled

    def poll(self) -> None:
        """See `Watched.poll`."""
        with self._lock:
            if not self._ended:
                self._cancelled = bool(self._sender.is_cancelled())


class TritonReply(ResponseStream):
    """`engine.Reply` over the response sender of a decoupled request."""

    def __init__(self, request: Any, watcher: Watcher, tell_session: bool = False) -> None:
        """`tell_session`: the client left the choice of the session's capability to us."""
        super().__init__(request, watcher)
        self._tell_session = tell_session

    def send(self, commit: Commit) -> None:
        """Stream a commit."""
        self.send_tensors(encode_commit(commit, self._tell_session))

    def finish(self) -> None:
        """End the stream; this flag alone is no response at the client."""
        self.end(None)

    def fail(self, message: str) -> None:
        """End the request with a Triton error."""
        self.end(pb_utils.InferenceResponse(error=pb_utils.TritonError(message)))


def make_response(tensors: Mapping[str, Array]) -> Any:
    """A Triton response."""
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(*pair) for pair in tensors.items()])


def read_request(request: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and tensors of a Triton request."""
    return json.loads(request.parameters() or "{}"), {t.name(): t.as_numpy() for t in request.inputs()}


class Receiver(Protocol):
    """What takes messages: an engine, or one with something in front of it."""

    def submit(self, message: Open | Draft | Close, reply: Reply) -> None:
        """See `Engine.submit`."""


def submit(engine: Receiver, request: Any, limits: WireLimits, watcher: Watcher) -> None:
    """Decode a Triton request and hand it to the engine; a malformed one is answered here."""
    parameters, tensors = read_request(request)
    reply = TritonReply(request, watcher, tell_session=is_anonymous(tensors))
    try:
        message = decode_request(parameters, tensors, limits)
    except InvalidRequest as error:
        reply.fail(str(error))
        return
    engine.submit(message, reply)


def answer_batch(engine: UnaryEngine, requests: list[Any], limits: WireLimits) -> list[Any]:
    """One response for each unary request of a batch, in order. A malformed one, refused here, harms no other; an
    engine that fails, fails all of them, and is asked again with the next batch."""
    try:
        decoded = [_decode_verify(request, limits) for request in requests]
        answers = iter(engine.serve([one for one in decoded if isinstance(one, VerifyRequest)]))
        return [_response(next(answers) if isinstance(one, VerifyRequest) else one) for one in decoded]
    except Exception as error:
        log.exception("a batch of %d requests has failed", len(requests))
        line = " ".join(f"{UNAVAILABLE}the verifier has failed: {type(error).__name__}: {error}".split())[:300]
        return [_error(line, pb_utils.TritonError.UNAVAILABLE) for _ in requests]


def _decode_verify(request: Any, limits: WireLimits) -> VerifyRequest | InvalidRequest:
    try:
        return decode_verify(*read_request(request), limits)
    except InvalidRequest as error:
        return error


def _response(answer: Answer) -> Any:
    if isinstance(answer, InvalidRequest):
        return _error(str(answer), pb_utils.TritonError.INVALID_ARG)
    return make_response(encode_answer(answer))


def _error(line: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(line, code))


class Metrics:
    """The engine's telemetry on Triton's metrics endpoint. Every value told is a round trip to tritonserver's process,
    so only what has changed is told: `Totals` at every call, everything else once in `PUBLISH_PERIOD_S`."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._families = []  # a family must live as long as its metrics, or they raise
        self._tell: list[Callable[[float], None]] = []
        self._is_gauge: list[bool] = []
        for family in telemetry.families():
            kind = getattr(pb_utils.MetricFamily, family.kind.name)
            ours = pb_utils.MetricFamily(name=family.name, description=family.help, kind=kind)
            self._families.append(ours)
            for labels in family.labels:
                metric = ours.Metric(labels=dict(labels))
                self._tell.append(metric.set if family.kind is Kind.GAUGE else metric.increment)
                self._is_gauge.append(family.kind is Kind.GAUGE)
        self._told = [0.0] * len(self._tell)
        self._next_s = 0.0

    def publish(self, now_s: float, refresh: Callable[[], None]) -> None:
        """Tell what has changed since the last call; `refresh` brings gauges up to date and is called before them."""
        values = self._telemetry.totals.values()  # they come first
        if now_s >= self._next_s:
            self._next_s = now_s + PUBLISH_PERIOD_S
            refresh()
            values = self._telemetry.values()
        for i, value in enumerate(values):
            if value != self._told[i]:
                self._tell[i](value if self._is_gauge[i] else value - self._told[i])
                self._told[i] = value


def unload(model_name: str) -> None:
    """Have Triton unload a model, this one included. Raises if the server is not under explicit model control."""
    pb_utils.unload_model(model_name)


def fail_load(message: str) -> Exception:
    """The exception with which a model refuses to load."""
    return pb_utils.TritonModelException(message)


class TritonLogHandler(logging.Handler):
    """Python logging into Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            pb_utils.Logger.log_error(text)
        elif record.levelno >= logging.WARNING:
            pb_utils.Logger.log_warn(text)
        else:
            pb_utils.Logger.log_info(text)
