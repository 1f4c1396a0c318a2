"""Devices whose drafting is emulated: the real edge client and gRPC stream, and drafts made from a known text.

Eight draft models on the server's own two cores would measure those cores and not the scheduler. So the text that the
target gives is generated beforehand, and a draft token is that text's token at its position, or a wrong one: wrong
with probability 1 - acceptance, decided for each position by the seed, and always behind a chain that is wrong
already. A draft step sleeps for as long as the device would compute.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from bench.live import make_open
from edge_runtime.client import EdgeClient, TokenTimes
from edge_runtime.transport import GrpcStream
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.messages import Commit, Mode, Sampling, Slo, Tokens
from wisp_plugin.stop_rules import Fixed
from wisp_plugin.wire_values import named_slo


class ReplayingDrafter:
    """A `TokenDrafter` for one text."""

    def __init__(
        self,
        text: Tokens,
        tokens_per_s: float,
        acceptance: float,
        seed: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`text` is prompt and generated tokens; nothing can be drafted behind it."""
        if not tokens_per_s > 0:
            raise ValueError(f"a drafter makes {tokens_per_s} tokens/s; allowed: more than 0")
        self._text = text
        self._step_s = 1.0 / tokens_per_s
        self._is_wrong = np.random.default_rng(seed).random(len(text)) >= acceptance
        self._sleep = sleep

    def advance(self, tokens: Tokens) -> int:
        """See `TokenDrafter.advance`. The device's own prefill is not emulated."""
        return 0

    def draft_token_with_stats(self, tokens: Tokens, sampling: Sampling) -> tuple[int, None]:
        """See `TokenDrafter.draft_token_with_stats`. IndexError behind the end of the text."""
        position = len(tokens)
        right = int(self._text[position])
        self._sleep(self._step_s)
        is_right = not self._is_wrong[position] and np.array_equal(tokens, self._text[:position])
        return right if is_right else right ^ 1, None


@dataclass(frozen=True, slots=True)
class Device:
    """One device and its session: asks for the SLO class `slo_class`, `opens_s` after the start.

    `generated` is the text that the target gives behind `prompt`; the session runs to its end. The run goes on until
    all devices with `sets_end` are done; others are closed then. `drafts_per_s` 0 is a thin client.
    """

    slo_class: str
    prompt: Tokens
    generated: Tokens
    opens_s: float
    sets_end: bool
    drafts_per_s: float = 0.0
    acceptance: float = 0.0
    max_ahead: int = 0
    seed: int = 0

    def drafter(self) -> ReplayingDrafter | None:
        """What drafts; None for a thin client."""
        if not self.drafts_per_s:
            return None
        text = np.concatenate([self.prompt, self.generated])
        return ReplayingDrafter(text, self.drafts_per_s, self.acceptance, self.seed)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A commit with tokens as its device saw it."""

    at_s: float
    num_tokens: int
    measured_s: float  # the pass behind it
    num_sessions: int  # in that pass


@dataclass(slots=True)
class DeviceResult:
    """What a device got. `cut_s`: when the end of the run cut the session off (None: it came to its own end)."""

    slo_class: str
    tokens: Tokens
    times: TokenTimes
    arrivals: list[Arrival]
    num_drafted: int
    num_accepted: int
    cut_s: float | None = None

    @property
    def tpot_ms(self) -> float:
        """Mean time per token behind the first one (infinite without a token).

        In a session that was cut off, a token that had been overdue for longer than that mean counts as if it had
        come at the cut: who starves a session at the end gains nothing.
        """
        if not self.times.num_tokens:
            return float("inf")
        if self.cut_s is None:
            return self.times.mean_tpot_ms
        return max(self.times.mean_tpot_ms, 1e3 * (self.cut_s - self.times.first_s) / self.times.num_tokens)

    def meets(self, slo: Slo) -> bool:
        """Whether the session met `slo`, at the client."""
        return self.times.ttft_ms <= slo.ttft_ms and self.tpot_ms <= slo.tpot_ms

    def token_gaps_ms(self) -> list[float]:
        """Time of each token behind the first commit: the gap to the commit before, over the commit's tokens."""
        gaps: list[float] = []
        for before, after in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps += [1e3 * (after.at_s - before.at_s) / after.num_tokens] * after.num_tokens
        return gaps


@dataclass(slots=True)
class _Run:
    """What the devices of one run share: its start and its end."""

    num_open_ends: int  # devices that set the end and are not done
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_over(self) -> bool:
        return self._ended.is_set()

    def wait_until(self, opens_s: float) -> None:
        """Return `opens_s` after the start, or at the end of the run."""
        self._ended.wait(max(0.0, self.started_s + opens_s - time.monotonic()))

    def one_is_done(self) -> None:
        with self._lock:
            self.num_open_ends -= 1
            if self.num_open_ends == 0:
                self.end()

    def end(self) -> None:
        self.ended_s = time.monotonic()
        self._ended.set()


def run_devices(server: str, devices: Sequence[Device], mode: Mode = Mode.FREE) -> list[DeviceResult]:
    """Run all devices against the server at HOST:PORT, each in a thread of its own; results in their order.

    Raises whatever one of them raises (the others are closed then), and ValueError if none sets the end.
    """
    num_ends = sum(device.sets_end for device in devices)
    if not num_ends:
        raise ValueError("no device sets the end of the run")
    run = _Run(num_ends)
    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(_run_device, server, device, mode, run) for device in devices]
        return [future.result() for future in futures]


def _run_device(server: str, device: Device, mode: Mode, run: _Run) -> DeviceResult:
    try:
        run.wait_until(device.opens_s)
        result = _serve(server, device, mode, run)
    except BaseException:
        run.end()  # nobody waits for a device that has failed
        raise
    if device.sets_end:
        run.one_is_done()
    return result


def _serve(server: str, device: Device, mode: Mode, run: _Run) -> DeviceResult:
    """One session, until it has all its tokens or the run is over."""
    opened = make_open(device.prompt, len(device.generated), mode, Sampling())
    opened = dataclasses.replace(opened, slo=named_slo(device.slo_class))
    drafter = device.drafter()
    session = EdgeSession(opened, SpeculationController(Fixed(device.max_ahead if drafter else 0)))
    arrivals: list[Arrival] = []

    def on_commit(commit: Commit) -> None:
        if len(commit.tokens):
            measured_s, num_sessions = commit.timing.measured_us / 1e6, commit.timing.num_sessions
            arrivals.append(Arrival(time.monotonic(), len(commit.tokens), measured_s, num_sessions))

    client = EdgeClient(opened, session, GrpcStream(server), drafter, on_commit=on_commit)
    try:
        for _ in client.run():
            if run.is_over:
                break
    finally:
        client.close()
    is_cut = len(session.generated) < opened.max_new_tokens
    stats = session.stats
    return DeviceResult(
        device.slo_class, session.generated.copy(), client.times, arrivals, stats.num_drafted, stats.num_accepted,
        cut_s=run.ended_s if is_cut else None,
    )  # fmt: skip
