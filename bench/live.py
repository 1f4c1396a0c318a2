"""Live runs for the benchmarks: a real tritonserver, real edge clients, and what the server counted meanwhile."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.client import EdgeClient, TokenDrafter
from edge_runtime.cores import usable_cores
from edge_runtime.transport import GrpcStream, VerifyTransport
from triton_models.server_process import ServerProcess
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession, EdgeStats
from wisp_plugin.messages import Commit, Mode, Open, Sampling, Slo, Tokens
from wisp_plugin.speculation import no_drafts
from wisp_plugin.stop_rules import Fixed
from wisp_plugin.wire import new_session_id

_COUNTER = re.compile(r"^(wisp_\w+_total)(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)
SETTLE_S = 0.6  # the engine publishes its totals a few times per second


def half_the_cores() -> int:
    """Threads for each side when device and server share a machine: they compute at the same time."""
    return max(1, usable_cores() // 2)


@dataclass(frozen=True, slots=True)
class Drafting:
    """How a device drafts; without a drafter it is a thin client.

    `make_controller` makes the controller of each session (None: a fixed draft length of `max_ahead`).
    """

    drafter: TokenDrafter | None = None
    mode: Mode = Mode.FREE
    max_ahead: int = 8
    make_controller: Callable[[], SpeculationController] | None = None

    def session(self, opened: Open) -> EdgeSession:
        """The device's side of a session that is not open yet."""
        if self.drafter is None:
            return EdgeSession(opened, no_drafts())
        make = self.make_controller or (lambda: SpeculationController(Fixed(self.max_ahead)))
        return EdgeSession(opened, make())


@dataclass(frozen=True, slots=True)
class SessionResult:
    """What one session gave."""

    tokens: Tokens
    stats: EdgeStats
    elapsed_s: float
    first_token_s: float

    @property
    def tokens_per_s(self) -> float:
        """Committed tokens per second, from the open to the last commit."""
        return self.stats.num_committed / self.elapsed_s


def make_open(
    prompt: Tokens, max_new_tokens: int, mode: Mode, sampling: Sampling, eos_token_ids: tuple[int, ...] = ()
) -> Open:
    """An open of a fresh session. Without `eos_token_ids` it runs to its length."""
    return Open(
        session=new_session_id(),
        tokens=prompt,
        prompt_len=len(prompt),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        slo=Slo(ttft_ms=2_000.0, tpot_ms=200.0),
        mode=mode,
        eos_token_ids=eos_token_ids,
    )


def run_session(
    server: str,
    opened: Open,
    drafting: Drafting,
    on_tokens: Callable[[Tokens], None] = lambda tokens: None,
    on_commit: Callable[[Commit], None] = lambda commit: None,
    connect: Callable[[str], VerifyTransport] = GrpcStream,
) -> SessionResult:
    """One session from open to its final status, on the server at HOST:PORT, which `connect` reaches."""
    session = drafting.session(opened)
    client = EdgeClient(opened, session, connect(server), drafting.drafter, on_commit=on_commit)
    try:
        for tokens in client.run():
            on_tokens(tokens)
    finally:
        client.close()
    times = client.times
    return SessionResult(
        session.generated.copy(), session.stats, times.last_s - times.opened_s, times.first_s - times.opened_s
    )


def server_totals(server: ServerProcess) -> dict[str, float]:
    """The server's WISP counters by name, over all labels, after it had time to publish them."""
    time.sleep(SETTLE_S)
    with urllib.request.urlopen(server.metrics_url, timeout=5.0) as response:
        text = response.read().decode()
    totals: dict[str, float] = {}
    for name, value in _COUNTER.findall(text):
        short = name.removeprefix("wisp_").removesuffix("_total")
        totals[short] = totals.get(short, 0.0) + float(value)
    return totals


def requests_per_batch(server: ServerProcess, model: str) -> float:
    """Mean size of the batches that Triton has made for `model` so far; 0 before the first."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/stats", timeout=5.0) as response:
        stats = json.load(response)["model_stats"][0]
    return stats["inference_count"] / max(1, stats["execution_count"])


@dataclass(frozen=True, slots=True)
class ServerShare:
    """What the server counted between two looks."""

    passes: float
    tokens_per_commit: float
    acceptance_rate: float | None

    @classmethod
    def between(cls, before: dict[str, float], after: dict[str, float]) -> ServerShare:
        """The difference of two `server_totals`."""
        gone = {name: after[name] - before.get(name, 0.0) for name in after}
        return cls(
            passes=gone["passes"],
            tokens_per_commit=gone["committed_tokens"] / max(1.0, gone["commits"]),
            acceptance_rate=gone["accepted_tokens"] / gone["verified_tokens"] if gone["verified_tokens"] else None,
        )
