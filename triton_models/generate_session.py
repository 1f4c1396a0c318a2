"""One session of `wisp_generate`: prompt to tokens, a session of the verifier, its commits to text."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from triton_models.generate_request import GenerateRequest
from triton_models.text_tokenizer import TextTokenizer
from wisp_plugin.errors import InvalidRequest, ModelError, RequestRefused, WispError
from wisp_plugin.messages import PROTOCOL_VERSION, Commit, Status, Tokens
from wisp_plugin.text_stream import TextStream
from wisp_plugin.wire import UNAVAILABLE, new_session_id
from wisp_plugin.wire_values import Parameter, slo_parameters

log = logging.getLogger(__name__)

_REASONS = {Status.EOS: "stop", Status.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Ending:
    """What the last response tells. `text`: what was not streamed before it."""

    text: str
    reason: str
    num_input_tokens: int
    num_output_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of one line. `is_ours`: trying again later may help; else the request itself is at fault."""

    message: str
    is_ours: bool


class Reply(Protocol):
    """The answer channel of a request. Exactly one of `finish` and `fail` is called, once, last."""

    def send(self, text: str) -> None:
        """Stream a piece of text."""

    def finish(self, ending: Ending) -> None:
        """The last response."""

    def fail(self, failure: Failure) -> None:
        """End with an error."""

    def is_cancelled(self) -> bool:
        """True if the client has left."""


class Calls(Protocol):
    """Sessions of the verifier, from any thread."""

    def open(self, session: str, parameters: Mapping[str, Parameter], tokens: Tokens, lookup: str) -> Iterator[Commit]:
        """Begin a session; its commits as they come, to its end. `lookup`: "auto" or "off".

        Raises, here or while iterating:
            RequestRefused: the verifier refuses the request.
            TransportError: it is not there, cannot serve now, has gone, or has been silent for too long.
        """

    def close(self, session: str) -> None:
        """End a session whose tokens are not wanted any more, wherever it is; its commits end then."""


class GenerateSession:
    """`run` serves the request in a thread of its own; `look_after` is called from another one from time to time."""

    def __init__(
        self,
        request: GenerateRequest,
        reply: Reply,
        calls: Calls,
        tokenizer: TextTokenizer,
        vocab_hash: str = "",
    ) -> None:
        self._request, self._reply, self._calls, self._tokenizer = request, reply, calls, tokenizer
        self._vocab_hash = vocab_hash
        self._id = new_session_id()
        self._text = TextStream(tokenizer.decode, request.stop)
        self._num_input_tokens = 0
        self._lock = threading.Lock()
        self._is_answered = False  # the reply has its end; what the verifier still sends is of no interest
        self._is_open = self._is_closed = False

    # -- in the session's thread --------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve the request to its end. Raises nothing: whatever happens is the answer."""
        try:
            self._serve(self._open())
        except (InvalidRequest, ModelError, RequestRefused) as error:  # ModelError: the chat template refuses it
            self._fail(str(error), is_ours=False)
        except WispError as error:
            self._fail(str(error) if str(error).startswith(UNAVAILABLE) else f"{UNAVAILABLE}{error}", is_ours=True)
            self._close()  # where it still runs, nobody listens
        except Exception as error:
            log.exception("wisp_generate: a session has failed")
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._fail(f"{UNAVAILABLE}wisp_generate has failed: {line}", is_ours=True)
            self._close()

    def _open(self) -> Iterator[Commit]:
        tokens = self._prompt()
        self._num_input_tokens = len(tokens)
        commits = self._calls.open(self._id, self._parameters(), tokens, self._request.lookup)
        with self._lock:
            self._is_open = True
            is_unwanted = self._is_answered
        if is_unwanted:  # the client has left meanwhile
            self._close()
        return commits

    def _prompt(self) -> Tokens:
        request = self._request
        tokens = self._tokenizer.encode_chat(request.text) if request.chat else self._tokenizer.encode(request.text)
        if not len(tokens):
            raise InvalidRequest("tensor 'text_input' is empty; a prompt needs at least one token")
        return tokens

    def _parameters(self) -> dict[str, Parameter]:
        request, sampling = self._request, self._request.sampling
        parameters: dict[str, Parameter] = {
            "op": "open",
            "protocol": PROTOCOL_VERSION,
            "seed": sampling.seed,
            "temperature": repr(sampling.temperature),
            "top_k": sampling.top_k,
            "top_p": repr(sampling.top_p),
            "repetition_penalty": repr(sampling.repetition_penalty),
            **slo_parameters(request.slo),
        }
        if request.max_tokens is not None:
            parameters["max_new_tokens"] = request.max_tokens
        if request.ignore_eos:
            parameters["ignore_eos"] = True
        if self._vocab_hash:
            parameters["vocab_hash"] = self._vocab_hash
        return parameters

    def _serve(self, commits: Iterator[Commit]) -> None:
        """Turn commits into text, up to the end of their stream, also when nobody wants them any more."""
        for commit in commits:
            if not self._is_answered:
                self._take(commit)
        self._fail(f"{UNAVAILABLE}the verifier has ended the session without a status", is_ours=True)

    def _take(self, commit: Commit) -> None:
        piece = "".join(self._text.push(commit.tokens))
        if self._text.stopped is not None:
            self._finish(piece, "stop")
            self._close()
        elif commit.status in _REASONS:
            piece += self._text.flush()  # what was held back may be a stop string after all
            self._finish(piece, "stop" if self._text.stopped is not None else _REASONS[commit.status])
        elif commit.status is Status.OVERLOADED:
            self._fail(f"{UNAVAILABLE}overloaded, try again in {commit.retry_after_ms} ms", is_ours=True)
        elif commit.status is not Status.RUNNING:
            reason = "the server is shutting down" if commit.status is Status.CLOSED else commit.status.name.lower()
            self._fail(f"{UNAVAILABLE}the verifier has ended the session: {reason}", is_ours=True)
        elif piece and self._request.stream:
            self._send(piece)

    # -- answers, from any thread -------------------------------------------------------------------------------

    def _send(self, piece: str) -> None:
        with self._lock:
            if not self._is_answered:
                self._reply.send(piece)

    def _finish(self, piece: str, reason: str) -> None:
        request = self._request
        text = piece if request.stream else self._text.text
        if request.full_text:
            text = request.text + text
        num_tokens = self._text.num_tokens
        ending = Ending(text, reason, self._num_input_tokens, num_tokens, request.sampling.seed)
        with self._lock:
            if not self._is_answered:
                self._is_answered = True
                self._reply.finish(ending)

    def _fail(self, message: str, is_ours: bool) -> None:
        with self._lock:
            if not self._is_answered:
                self._is_answered = True
                self._reply.fail(Failure(message, is_ours))

    def _close(self) -> None:
        """Tell the verifier, once, that no more is wanted."""
        with self._lock:
            if self._is_closed or not self._is_open:
                return
            self._is_closed = True
        self._calls.close(self._id)

    # -- in the watcher's thread --------------------------------------------------------------------------------

    def look_after(self) -> None:
        """End the session if its client has left."""
        if not self._is_answered and self._reply.is_cancelled():
            self._fail("the client has left", is_ours=False)
            self._close()
