"""One request's session: it runs in a thread of its own and is read from the event loop, batch by batch.

    session thread: commits ─▶ text ─▶ Batch ──(at most MAX_BATCHES)──▶ event loop: `async for batch in generation`

A client that reads nothing stops its own session: its thread waits, commits are not acknowledged any more, and the
server pauses it. After `SLOW_CLIENT_S` the session ends; what is read behind the batches that are left is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from edge_runtime.gateway.device import EdgeRun, GatewayDevice
from edge_runtime.gateway.errors import Refusal, defect, failed_generation, refusal_of
from edge_runtime.gateway.parameters import GenerationRequest
from edge_runtime.gateway.transport import Left
from wisp_plugin.edge_stats import EdgeStats
from wisp_plugin.errors import RequestRefused, TransportError
from wisp_plugin.messages import Commit, Origin, Status, Tokens
from wisp_plugin.text_stream import TextStream

log = logging.getLogger(__name__)
MAX_BATCHES = 64
SLOW_CLIENT_S = 60.0
_RETRY_S, _MAX_RETRY_S = 0.1, 1.0
_SENDING_S = 0.02  # limit of waiting until the last batch is sent: to end a session takes time that sending it wants
LENGTH, EOS, STOP = "length", "eos_token", "stop_sequence"


@dataclass(frozen=True, slots=True)
class Token:
    """A committed token. `text` is what it made final: empty while a character or a stop string may be incomplete."""

    id: int
    text: str
    origin: Origin
    logprob: float | None = None
    special: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """What one commit brought. `finish` is set with the last one: why the text ended."""

    tokens: tuple[Token, ...]
    finish: str | None = None
    tail: str = ""  # with `finish`, text that no token of this batch has made final


@dataclass(slots=True)
class Times:
    """Of one request, by the gateway's clock, in seconds: what its headers and metrics are made of."""

    arrived_s: float
    validated_s: float = 0.0
    started_s: float = 0.0
    first_s: float = 0.0
    ended_s: float = 0.0


class Generation:
    """One request's session, which `work` drives. Read it once, `async for`; then `leave` it, whatever happened."""

    def __init__(self, device: GatewayDevice, request: GenerationRequest, times: Times) -> None:
        self.request, self.times = request, times
        self.num_tokens = 0
        self.finish: str | None = None
        self.run: EdgeRun = device.start(request)
        self._device = device
        self._text = TextStream(device.tokenizer.decode, request.stop)
        self._loop = asyncio.get_running_loop()
        self._batches: deque[Batch | Refusal] = deque()
        self._room = threading.Semaphore(MAX_BATCHES)
        self._arrived = asyncio.Event()
        self._commit: Commit | None = None
        self._commits_before = 0
        self.run.client.on_commit = self._note
        self.on_ended: Callable[[], None] = lambda: None  # called in the event loop when the thread has nothing to do

    @property
    def stats(self) -> EdgeStats:
        """Of the session on the device."""
        return self.run.client.session.stats

    def leave(self) -> None:
        """Nobody reads on: end the session if it still runs."""
        self.run.transport.leave()
        self._room.release()

    async def __aiter__(self) -> AsyncIterator[Batch]:
        """Batches until the one with `finish`. Raises Refusal."""
        while self.finish is None:
            batch = self.poll()
            if batch is None:
                await self.arrival()
            else:
                yield batch

    def poll(self) -> Batch | None:
        """As the iteration, without waiting: None if nothing has arrived. Raises Refusal."""
        if self.finish is not None or not self._batches:
            return None
        batch = self._batches.popleft()
        self._room.release()
        if isinstance(batch, Refusal):
            raise batch
        return self._count(batch)

    async def arrival(self, limit_s: float | None = None) -> None:
        """Wait until `poll` may have something, at most `limit_s` (None: the session's own limits hold)."""
        if self._batches:
            return
        self._arrived.clear()
        try:
            await asyncio.wait_for(self._arrived.wait(), limit_s)
        except TimeoutError:
            return

    def _count(self, batch: Batch) -> Batch:
        now_s = time.monotonic()
        if batch.tokens and not self.num_tokens:
            self.times.first_s = now_s
        self.num_tokens += len(batch.tokens)
        if batch.finish is not None:
            self.finish, self.times.ended_s = batch.finish, now_s
        return batch

    # -- the session's thread -----------------------------------------------------------------------------------

    def work(self) -> None:
        """The session from open to close, in a thread of its own."""
        try:
            self._generate()
        except Left:
            log.debug("the client of a session has left")
        except Exception as error:
            refusal = refusal_of(error)
            if refusal is None:
                log.exception("a session failed")
            with contextlib.suppress(Left):
                self._post(refusal or defect())
        finally:
            try:
                self._device.end(self.run)
            except Exception:
                log.exception("a session could not be closed in good order")
            self._tell(lambda: self.on_ended())
        self._device.prepare()

    def _generate(self) -> None:
        """Commits to batches, until the text ends. While the server is away, try again for `server_wait_s`."""
        deadline_s, pause_s = time.monotonic() + self._device.server_wait_s, _RETRY_S
        while True:
            try:
                for tokens in self.run.client.run():
                    if self._give(tokens):
                        return
                return
            except RequestRefused:
                raise
            except TransportError:
                # The client itself tries again once it has had a commit; a first connection is up to us.
                if self._commit is not None or time.monotonic() + pause_s > deadline_s:
                    raise
                self.run.transport.pause(pause_s)
                pause_s = min(2 * pause_s, _MAX_RETRY_S)

    def _note(self, commit: Commit) -> None:
        self._commit = commit

    def _give(self, tokens: Tokens) -> bool:
        """Post what the newest commit brought; True if the text has ended with it."""
        commit = self._commit
        assert commit is not None, "tokens come with a commit"
        if self.run.share is not None:
            self.run.share.num_tokens += len(tokens)
        pieces = self._text.push(tokens)
        has_ended = commit.status is not Status.RUNNING
        tail = self._text.flush() if has_ended else ""
        finish = self._finish(commit)
        num_counted = self._text.num_tokens - self._commits_before
        self._commits_before = self._text.num_tokens
        given = [self._token(commit, i, pieces[i]) for i in range(num_counted)]
        if tail and given:  # a character that never became whole, or the beginning of a stop string
            given[-1], tail = replace(given[-1], text=given[-1].text + tail), ""
        if given or finish:
            self._post(Batch(tuple(given), finish, tail))
        if finish is not None:
            self.run.transport.await_leave(_SENDING_S)
        return finish is not None

    def _finish(self, commit: Commit) -> str | None:
        if self._text.stopped is not None:
            return STOP
        return {Status.EOS: EOS, Status.LENGTH: LENGTH}.get(commit.status)

    def _token(self, commit: Commit, index: int, piece: str) -> Token:
        token = int(commit.tokens[index])
        logprob = None if commit.logprobs is None else float(commit.logprobs[index])
        special = token in self._device.tokenizer.special_token_ids
        return Token(token, piece, Origin(int(commit.origin[index])), logprob, special)

    def _post(self, batch: Batch | Refusal) -> None:
        if not self._room.acquire(timeout=SLOW_CLIENT_S):
            self._arrive(failed_generation(f"its client has read nothing for {SLOW_CLIENT_S:g} s"))  # if it reads again
            raise Left
        if self.run.transport.is_left:
            raise Left
        self._arrive(batch)

    def _arrive(self, batch: Batch | Refusal) -> None:
        def arrive() -> None:
            self._batches.append(batch)
            self._arrived.set()

        self._tell(arrive)

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: the gateway has ended, nobody is there to be told
            log.debug("a session has outlived the gateway")
