"""Messages and sessions with sensible values; a test names only what it is about."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.messages import Commit, Draft, Mode, Open, Origin, PassOutcome, Sampling, Slo, Status, Timing
from wisp_plugin.roster import Candidates
from wisp_plugin.server_session import ServerSession

SESSION = "0123456789abcdef0123456789abcdef"
GARBAGE = 77  # a choice behind the first difference: it means nothing


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


def give_pass(session: ServerSession, *chosen: int, budget: int = 100, now_s: float = 1.0) -> Commit | None:
    """A pass of at most `budget` tokens, uncached ones first, in which the target chooses `chosen`."""
    num_uncached = min(budget, session.num_uncached)
    item = session.pass_item(num_uncached, min(budget - num_uncached, session.num_buffered))
    padded = (*chosen, *[GARBAGE] * item.num_choices)[: item.num_choices]
    return session.commit(item, PassOutcome(session.id, ids(*padded)), Timing(), now_s)


def make_candidates(num_sessions: int, survival: Any = (), **columns: Any) -> Candidates:
    """Candidates that decode for 50 turns now: 10 tokens cached, 1 uncached, needed at 1 s, tpot 0.1 s, ready since 0.

    A column is one value for all or one for each. `survival` is one row per session, or one for all: it says how
    many draft tokens each has buffered, those above 0.
    """
    defaults = {
        "num_cached": 10.0, "num_uncached": 1.0, "needed_s": 1.0, "tpot_s": 0.1, "next_draft_s": np.inf,
        "ready_s": 0.0, "tokens_per_turn": 1.0, "is_lost": 0.0, "opened_s": 0.0,
        "draft_gap_s": 0.0, "acceptance": 0.75, "way_s": 0.0, "worth_tokens": 0.0, "worth_gain": 0.0,
        "is_new_chain": 0.0, "is_sync": 0.0, "num_turns": 50.0, "num_left": 100.0, "own_acceptance": 0.75,
    }  # fmt: skip
    rows = np.asarray(survival, np.float64)
    rows = np.broadcast_to(rows, (num_sessions, rows.shape[-1])).copy()
    named = {name: np.full(num_sessions, value, np.float64) for name, value in (defaults | columns).items()}
    return Candidates(rows=np.arange(num_sessions), num_buffered=(rows > 0).sum(axis=1) * 1.0, survival=rows, **named)


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


def make_estimator() -> Estimator:
    """An estimator of a small server: 10 ms for a pass, 1 ms per new token on top of 2 ms."""
    return Estimator(Costs(memory=(0.01, 0, 0, 0, 0, 0), arithmetic=(0.002, 0, 0.001, 0, 0, 0)))


def same(left: Any, right: Any) -> bool:
    """True if two messages are equal field by field, arrays in dtype too."""
    if type(left) is not type(right):
        return False
    if dataclasses.is_dataclass(left):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    return bool(left == right)
