"""The way to the server: `VerifyTransport`, and its form over Triton's gRPC stream (one stream per device).

`tritonclient` runs the stream in threads of its own and calls back; here its results are decoded and put into a
queue that one thread reads; another one may send meanwhile.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import InferenceServerClientPlugin

from edge_runtime.commit_inbox import CommitInbox
from wisp_plugin.errors import ConfigError, RequestRefused, TransportError, WispError
from wisp_plugin.messages import Close, Commit, Draft, Open
from wisp_plugin.wire import UNAVAILABLE, decode_commit, encode_request

VERIFIER_MODEL = "wisp_verifier"
CONNECT_S = 5.0  # limit of waiting for the server's first answer
READY_HOLDS_S = 5.0  # how long its answer to `prepare` holds
CLOSE_S = 1.0  # limit of waiting for the server's end of the stream
_RECONNECT_MS, _MAX_RECONNECT_MS = 100, 1000
_MAX_MESSAGE_BYTES = 2**31 - 1  # as tritonclient's own
_TRITON_DTYPES = {"int32": "INT32", "uint8": "UINT8", "object": "BYTES"}
# Answers about the server's state, ours and Triton's own: opening again later may help.
PASSING = (UNAVAILABLE, "is not healthy", "is not ready", "unknown model", "stopped accepting", "is stopping")
_NUMPY_DTYPES = {"INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8, "FP32": np.float32}


class VerifyTransport(Protocol):
    """Moves messages of one session to the server and its commits back.

    One thread calls `open`, `receive` and `close`; another one may call `send` between them.
    """

    def open(self, message: Open) -> None:
        """Connect, if need be anew, and start or resume the session. Raises TransportError."""

    def send(self, message: Draft | Close) -> None:
        """Send without waiting for an answer. Raises TransportError if the connection is known to be lost."""

    def receive(self, timeout_s: float) -> Commit | None:
        """The next commit; None if there is none within `timeout_s`, or `wake` was called.

        Raises:
            TransportError: the connection broke; `open` may be called again.
            RequestRefused: the server answered a request with an error.
        """

    def wake(self) -> None:
        """From any thread: let a `receive` that waits, or else the next one that finds no commit, return None."""

    def close(self) -> None:
        """Leave; the server unschedules what is still running."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for TLS: the authority that signed the server, and the client's own pair for mutual TLS.

    `token` is a file with a bearer token for a proxy in front of the server, which Triton itself does not look at. It
    goes with TLS alone: anybody on the way could take it.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token: Path | None = None

    def __post_init__(self) -> None:
        for path in (self.ca, self.cert, self.key):
            if path is not None and not path.is_file():
                raise ConfigError(f"TLS file {path} does not exist")
        if (self.cert is None) != (self.key is None):
            raise ConfigError("a TLS client certificate needs both --cert and --key")
        if self.token is not None:
            read_token(self.token)


def read_token(path: Path) -> str:
    """The bearer token in `path`. ConfigError, without the token in it, if there is none or it could not be sent."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not ASCII" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        raise ConfigError(f"token file {path} {reason}") from None
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(f"token file {path} must hold one token, a line of printable characters without spaces")
    return token


class _BearerToken(InferenceServerClientPlugin):
    """Puts the token onto every call. The file is read anew each time: a token that was renewed needs no restart."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, request: Any) -> None:
        request.headers = {**(request.headers or {}), "authorization": f"Bearer {read_token(self._path)}"}


class GrpcStream:
    """A session's bidirectional stream to `wisp_verifier` on a Triton server."""

    def __init__(
        self, server: str, tls: TlsFiles | None = None, vocab_hash: str = "", keepalive_s: float = 20.0
    ) -> None:
        """`server` is HOST:PORT of Triton's gRPC endpoint."""
        self._server = server
        self._tls = tls
        self._vocab_hash = vocab_hash
        self._keepalive_s = keepalive_s
        self._client: triton.InferenceServerClient | None = None
        self._prepared: triton.InferenceServerClient | None = None
        self._ready_s = -READY_HOLDS_S  # when the server of `_prepared` said that it is ready
        self._inbox = CommitInbox()

    def prepare(self) -> None:
        """Make the connection for the next `open`, and ask the server whether it is ready. Raises TransportError."""
        self._prepared = self._prepared or connect(self._server, self._tls, self._keepalive_s)
        check_ready(self._prepared, self._server, VERIFIER_MODEL)
        self._ready_s = time.monotonic()

    def open(self, message: Open) -> None:
        """See `VerifyTransport.open`."""
        prepared, self._prepared = self._prepared, None
        self.close()
        session = message.session
        # The same tensor goes with every message: encode it once.
        self._session_input = as_input("SESSION", np.array([session.encode()], np.object_))
        # A fresh queue: whatever the old stream still delivers ends up in the old one.
        inbox = self._inbox = CommitInbox()
        self._client = prepared or connect(self._server, self._tls, self._keepalive_s)
        if prepared is None or time.monotonic() - self._ready_s > READY_HOLDS_S:
            check_ready(self._client, self._server, VERIFIER_MODEL)
        self._client.start_stream(callback=lambda result, error: inbox.put(_decode(session, result, error)))
        self._post(message)

    def send(self, message: Draft | Close) -> None:
        """See `VerifyTransport.send`."""
        self._post(message)

    def _post(self, message: Open | Draft | Close) -> None:
        if self._client is None:
            raise TransportError("the stream is not open")
        parameters, tensors = encode_request(message, self._vocab_hash)
        inputs = [as_input(name, array) for name, array in tensors.items() if name != "SESSION"]
        inputs.append(self._session_input)
        try:
            self._client.async_stream_infer(
                VERIFIER_MODEL, inputs, request_id=message.session[:8], parameters=parameters
            )
        except triton.InferenceServerException as error:
            raise TransportError(f"the connection to {self._server} is lost: {one_line(error)}") from None

    def receive(self, timeout_s: float) -> Commit | None:
        """See `VerifyTransport.receive`."""
        return self._inbox.take(timeout_s)

    def wake(self) -> None:
        """See `VerifyTransport.wake`."""
        self._inbox.wake()

    def close(self) -> None:
        """See `VerifyTransport.close`.

        Ends the stream by half-closing it, and by cancelling only if the server does not end it in turn: Triton
        before 25.04 can crash when a cancellation meets a response (server issues 7368 and 8034).
        """
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.close()
        client, self._client = self._client, None
        if client is None:
            return
        ending = threading.Thread(target=client.stop_stream, daemon=True)
        ending.start()
        ending.join(CLOSE_S)
        if ending.is_alive():
            client.stop_stream(cancel_requests=True)  # `client.close` alone would wait for the session's end
        client.close()


def connect(server: str, tls: TlsFiles | None, keepalive_s: float) -> triton.InferenceServerClient:
    """A client of the server at HOST:PORT; `tls` None: not encrypted. Raises TransportError."""
    options = [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", int(1e3 * keepalive_s)),
        ("grpc.keepalive_timeout_ms", int(1e3 * keepalive_s / 2)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients of one process share their connection, and gRPC's own pauses between two tries to make it: they must
        # not grow to two minutes, or a server that is back is not seen.
        ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS),
    ]
    files = tls or TlsFiles()
    try:
        client = triton.InferenceServerClient(
            url=server,
            ssl=tls is not None,
            root_certificates=str(files.ca) if files.ca else None,
            certificate_chain=str(files.cert) if files.cert else None,
            private_key=str(files.key) if files.key else None,
            channel_args=options,
        )
    except (triton.InferenceServerException, OSError, ValueError) as error:
        raise TransportError(f"cannot connect to {server}: {one_line(error)}") from None
    if files.token is not None:
        client.register_plugin(_BearerToken(files.token))
    return client


def check_ready(client: triton.InferenceServerClient, server: str, model: str) -> None:
    """Connections are made lazily: ask first, so that a server that is not there is noticed. Raises TransportError."""
    try:
        ready = client.is_model_ready(model, client_timeout=CONNECT_S)
    except triton.InferenceServerException as error:
        raise TransportError(f"no server at {server}: {one_line(error)}") from None
    if not ready:
        raise TransportError(f"the server at {server} has no model {model!r} ready")


def as_input(name: str, array: np.ndarray[Any, np.dtype[Any]]) -> triton.InferInput:
    """A tensor as tritonclient wants it."""
    tensor = triton.InferInput(name, list(array.shape), _TRITON_DTYPES[array.dtype.name])
    tensor.set_data_from_numpy(array)
    return tensor


def _decode(session: str, result: triton.InferResult | None, error: Exception | None) -> Commit | WispError:
    """What a callback of the stream brought, as a commit or as the error to raise in `receive`."""
    if error is not None:
        # An error of the stream itself carries a gRPC status; an answer to one request does not.
        broken = getattr(error, "status", lambda: None)() is not None
        text = one_line(error)
        passing = broken or any(phrase in text for phrase in PASSING)
        return TransportError(text) if passing else RequestRefused(text)
    assert result is not None
    response = result.get_response()
    try:
        # As `result.as_numpy` does, but in one walk over the outputs: commits are many and small.
        tensors = {
            output.name: np.frombuffer(raw, _NUMPY_DTYPES[output.datatype]).reshape(tuple(output.shape))
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
            if output.datatype in _NUMPY_DTYPES
        }
        return decode_commit(tensors, session)
    except (WispError, ValueError) as failure:
        return TransportError(f"the server sent something that is no commit: {failure}")


def one_line(error: Exception) -> str:
    """The message of an error, at most 300 characters."""
    text = error.message() if isinstance(error, triton.InferenceServerException) else str(error)
    return " ".join(str(text).split())[:300]
