"""Messages and sessions with sensible values; a test names only what it is about."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.messages import Commit, Draft, Mode, Open, Origin, Sampling, Slo, Status
from wisp_plugin.server_session import ServerSession

SESSION = "0123456789abcdef0123456789abcdef"


def ids(*tokens: int) -> np.ndarray:
    """Token ids."""
    return np.array(tokens, np.int32)


def session_id(number: int) -> str:
    """The capability of session `number`."""
    return f"{number:032x}"


def make_open(prompt: Any = (1, 2, 3), max_new_tokens: int = 8, **values: Any) -> Open:
    """An open; `prompt` is also what the client holds unless `tokens` is given."""
    prompt = np.asarray(prompt, np.int32)
    defaults: dict[str, Any] = {
        "session": SESSION,
        "tokens": prompt,
        "prompt_len": len(prompt),
        "sampling": Sampling(),
        "slo": Slo(ttft_ms=1000.0, tpot_ms=100.0),
        "mode": Mode.FREE,
    }
    return Open(max_new_tokens=max_new_tokens, **(defaults | values))


def make_session(now_s: float = 0.0, **values: Any) -> ServerSession:
    """A server session."""
    return ServerSession(make_open(**values), now_s)


def make_draft(start: int, *tokens: int, seen: int | None = None, session: str = SESSION) -> Draft:
    """A draft; `seen` is `start` unless given."""
    return Draft(session, start, start if seen is None else seen, ids(*tokens))


def make_commit(
    start: int,
    *tokens: int,
    origin: Origin = Origin.DECODED,
    status: Status = Status.RUNNING,
    session: str = SESSION,
) -> Commit:
    """A commit whose tokens all have one origin."""
    return Commit(session, start, ids(*tokens), np.full(len(tokens), origin, np.uint8), status)


def make_config(**values: Any) -> EngineConfig:
    """An engine configuration."""
    return EngineConfig(**values)


def same(left: Any, right: Any) -> bool:
    """True if two messages are equal field by field, arrays in dtype too."""
    if type(left) is not type(right):
        return False
    if dataclasses.is_dataclass(left):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    return bool(left == right)
