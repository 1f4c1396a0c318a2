"""All sessions of `wisp_generate`: a thread each, at most so many, looked after and drained."""

from __future__ import annotations

import logging
import threading
import time

from triton_models.generate_request import GenerateRequest
from triton_models.generate_session import Calls, Failure, GenerateSession, Reply
from triton_models.generate_settings import GenerateConfig
from triton_models.text_tokenizer import TextTokenizer
from wisp_plugin.wire import UNAVAILABLE

RETRY_AFTER_MS = 1_000  # told to clients that find all places taken
STOP_LIMIT_S = 3.0

log = logging.getLogger(__name__)


class GenerateService:
    """Takes requests from Triton's thread."""

    def __init__(self, config: GenerateConfig, tokenizer: TextTokenizer, vocab_hash: str, calls: Calls) -> None:
        self._config, self._tokenizer, self._vocab_hash, self._calls = config, tokenizer, vocab_hash, calls
        self._lock = threading.Lock()
        self._running: dict[threading.Thread, GenerateSession] = {}
        self._is_draining = False

    def submit(self, request: GenerateRequest, reply: Reply) -> None:
        """Serve a request; refused at once if there is no place for it."""
        session = GenerateSession(request, reply, self._calls, self._tokenizer, self._vocab_hash)
        thread = threading.Thread(target=self._run, args=(session,), name="wisp-generate", daemon=True)
        with self._lock:
            refusal = self._refusal()
            if refusal is None:
                try:
                    thread.start()
                    self._running[thread] = session
                except RuntimeError as error:  # no more of them
                    refusal = f"no thread can be started: {error}"
        if refusal is not None:
            reply.fail(Failure(f"{UNAVAILABLE}{refusal}", is_ours=True))

    @property
    def num_running(self) -> int:
        """Sessions that have a thread."""
        return len(self._running)

    def look_after(self) -> None:
        """To be called from time to time, in a thread that may wait."""
        with self._lock:
            sessions = list(self._running.values())
        for session in sessions:
            try:
                session.look_after()
            except Exception:
                log.exception("wisp_generate: a session cannot be looked after")  # the others still have to be

    def drain(self) -> None:
        """Refuse new requests. Those that run go to their end."""
        self._is_draining = True

    def stop(self, limit_s: float = STOP_LIMIT_S) -> None:
        """Refuse new requests and wait for those that run, for at most `limit_s`."""
        self.drain()
        end_s = time.monotonic() + limit_s
        with self._lock:
            threads = list(self._running)
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        if self._running:
            log.warning("wisp_generate: %d sessions have not ended within %g s", len(self._running), limit_s)

    def _refusal(self) -> str | None:
        if self._is_draining:
            return "the server is shutting down"
        if len(self._running) >= self._config.max_sessions:
            return f"overloaded, {self._config.max_sessions} requests run already, try again in {RETRY_AFTER_MS} ms"
        return None

    def _run(self, session: GenerateSession) -> None:
        try:
            session.run()
        finally:
            with self._lock:
                del self._running[threading.current_thread()]
