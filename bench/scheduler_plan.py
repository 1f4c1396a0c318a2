"""How long a decision takes: `Scheduler.plan` of policy `wisp` in real time.

plan_us_64, plan_us_1024   median microseconds of a decision with that many sessions
note_us_64, note_us_1024   median microseconds of `Scheduler.note` for one session that has changed

All sessions decode: contexts of 50 to 1,000 tokens, 0 to 8 buffered draft tokens, three SLO classes, up to 2 tokens
behind and 6 ahead of their schedule. Between two decisions, outside of their time, every session gets another buffer
and is noted, as when all have taken part in a pass and drafted on.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.gpu_cost import A100_32G
from bench.report import Progress, median, percentile, print_table
from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import Estimator
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import Draft, Open, Sampling, Slo
from wisp_plugin.scheduler import Scheduler, make_scheduler
from wisp_plugin.server_session import ServerSession

TARGETS = {"plan_us_64": "<= 200", "plan_us_1024": "<= 3000"}
_TPOT_MS = (40.0, 54.0, 90.0)
_FIRST_TOKEN_S, _NOW_S = 1.0, 3.0
_WARM_UPS = 20
_BLOCK_TOKENS = 32


def run(num_decisions: int, seed: int) -> dict[str, Any]:
    """Figures for 64 and 1,024 sessions, with a table. The larger number of sessions decides a quarter as often."""
    figures: dict[str, Any] = {}
    rows = []
    for num_sessions, num_timed in ((64, num_decisions), (1024, num_decisions // 4)):
        plan_us, note_us, num_members = time_decisions(num_sessions, num_timed, seed)
        figures |= {f"plan_us_{num_sessions}": median(plan_us), f"note_us_{num_sessions}": median(note_us)}
        rows.append((num_sessions, num_timed, median(plan_us), percentile(plan_us, 95), median(note_us), num_members))
    columns = ("sessions", "decisions", "plan us", "95 % us", "note us", "in the pass")
    print_table("Time of a decision, policy wisp", columns, rows)
    return figures


def time_decisions(num_sessions: int, num_timed: int, seed: int) -> tuple[list[float], list[float], float]:
    """Microseconds of each decision, of a note before each decision, and mean members of a pass."""
    random = np.random.default_rng((seed, num_sessions))
    scheduler, sessions = build(num_sessions, random)
    plan_us, note_us, num_members = [], [], 0
    with Progress(num_timed, f"decisions with {num_sessions} sessions") as progress:
        for i in range(_WARM_UPS + num_timed):
            noted_us = redraft(scheduler, sessions, random)
            start_s = time.perf_counter()
            plan = scheduler.plan(_NOW_S)
            planned_us = 1e6 * (time.perf_counter() - start_s)
            if i >= _WARM_UPS:
                plan_us.append(planned_us)
                note_us.append(noted_us)
                num_members += len(plan.items)
                progress.step()
    return plan_us, note_us, num_members / num_timed


def build(num_sessions: int, random: np.random.Generator) -> tuple[Scheduler, list[ServerSession]]:
    """A scheduler with sessions that decode around their schedule at `_NOW_S`."""
    most_blocks = num_sessions * (2 + 1000 // _BLOCK_TOKENS)
    pool = BlockPool(most_blocks, _BLOCK_TOKENS)
    config = EngineConfig(policy="wisp", max_pass_tokens=2048)
    scheduler = make_scheduler(config, pool, Estimator(A100_32G))
    sessions = []
    for i in range(num_sessions):
        context, tpot_ms = int(random.integers(50, 1001)), _TPOT_MS[i % len(_TPOT_MS)]
        prompt = np.arange(i, i + context, dtype=np.int32)
        slo = Slo(1e3 * _FIRST_TOKEN_S, tpot_ms)
        session = ServerSession(Open(f"{i:032x}", prompt, context, 400, Sampling(), slo), 0.0)
        scheduler.add(session)
        pool.extend(session.id, context - 1)
        session.num_cached = context - 1
        on_schedule = round((_NOW_S - _FIRST_TOKEN_S) / (tpot_ms / 1e3))
        session.timeline.on_commit(on_schedule + int(random.integers(-2, 7)), context, _FIRST_TOKEN_S)
        sessions.append(session)
    return scheduler, sessions


def redraft(scheduler: Scheduler, sessions: list[ServerSession], random: np.random.Generator) -> float:
    """Give every session another buffer and note it; microseconds per note."""
    sizes = random.integers(0, 9, len(sessions)).tolist()
    for session, size in zip(sessions, sizes, strict=True):
        end = session.num_committed
        session.on_draft(Draft(session.id, end, end, np.arange(size, dtype=np.int32)), _FIRST_TOKEN_S)
    start_s = time.perf_counter()
    for session in sessions:
        scheduler.note(session)
    return 1e6 * (time.perf_counter() - start_s) / len(sessions)
