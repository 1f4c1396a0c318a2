"""Who asks for what and when: devices and their sessions, from a seed (DESIGN.md section 2 for the words).

Every device draws from generators of its own: its sessions do not depend on the system under test, on other devices
or on their number. Systems are compared on one `Workload`, and a larger one contains the smaller.

Devices are of one kind with speeds from a range, or of several kinds (`DeviceKind`). Kinds are dealt out by a sequence
of low discrepancy, so that any number of devices has them close to their shares. A device that gets hot drafts slower
for a while (`Throttling`).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bench.gpu_cost import A100_32G, unloaded_pass_s
from wisp_plugin.messages import Slo

_MAX_SESSIONS = 1 << 20  # of one device
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_SEED_PERIOD = 1 << 20  # multiples of the golden ratio by larger seeds would have no digits left behind the point
_EPISODES_S = 600.0  # episodes of throttling repeat after so long


@dataclass(frozen=True, slots=True)
class SloClass:
    """A class of sessions: its tpot in unloaded passes, and its share of all sessions (relative)."""

    name: str
    tpot_passes: float
    share: float = 1.0


CLASSES = (SloClass("tight", 1.1), SloClass("medium", 1.5), SloClass("loose", 2.5))


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device: its usual draft speed, and its share of all devices (relative)."""

    drafted_tokens_per_s: float
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Throttling:
    """A device drafts at full speed for `cool_s` on average, then at `factor` of it for `hot_s`, both exponential."""

    factor: float = 0.5
    cool_s: float = 30.0
    hot_s: float = 8.0

    def episodes(self, rng: np.random.Generator) -> tuple[float, ...]:
        """When a device changes between full speed and less, in seconds up to `_EPISODES_S`; it starts at full."""
        ends: list[float] = []
        now_s, is_hot = float(rng.exponential(self.cool_s)), False
        while now_s < _EPISODES_S:
            ends.append(now_s)
            is_hot = not is_hot
            now_s += float(rng.exponential(self.hot_s if is_hot else self.cool_s))
        return tuple(ends)


@dataclass(frozen=True, slots=True)
class Device:
    """One edge device: how fast it drafts and how far away it is. Jitter comes on top of each half of the RTT.

    Between the first and the second of `episodes_s`, the third and the fourth, ... it drafts at `hot_factor` of its
    speed.
    """

    index: int
    drafted_tokens_per_s: float
    rtt_s: float
    jitter_s: float
    first_start_s: float
    episodes_s: tuple[float, ...] = ()
    hot_factor: float = 1.0

    def draft_step_s(self, now_s: float) -> float:
        """Seconds of a draft token that is begun at `now_s`."""
        speed = self.drafted_tokens_per_s
        if self.episodes_s and bisect.bisect_right(self.episodes_s, now_s % _EPISODES_S) % 2:
            speed *= self.hot_factor
        return 1.0 / speed


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """One session as its user wants it. `start_s` None: `think_s` after the device's session before has ended."""

    number: int
    device: int
    class_index: int
    slo: Slo
    prompt_len: int
    num_output_tokens: int
    start_s: float | None
    link_seed: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Devices and sessions. Ranges are (lowest, highest); speeds are drawn log-uniformly, RTTs uniformly.

    With `kinds`, speeds are those of the kinds with a lognormal spread of `speed_sigma` instead of the range.
    `timed` False (closed): each device starts its next session when the last one has ended and its user has thought
    for an exponential time of mean `think_s` (0: all are always active). True: the next session starts when the last
    one would end at exactly the pace of its SLO, whatever the system does; where it is slower, sessions of a device
    overlap and each drafts at the device's full speed.
    TTFT of a session: `ttft_tpots` x tpot + `prefill_allowance_s` per prompt token.
    """

    num_devices: int = 32
    drafted_tokens_per_s: tuple[float, float] = (60.0, 120.0)
    rtt_s: tuple[float, float] = (0.020, 0.020)
    jitter_s: float = 0.0
    classes: tuple[SloClass, ...] = CLASSES
    unloaded_pass_s: float = unloaded_pass_s(A100_32G)
    ttft_tpots: float = 10.0
    prefill_allowance_s: float = 0.001
    median_prompt_tokens: int = 250
    median_output_tokens: int = 200
    length_sigma: float = 0.6
    prompt_range: tuple[int, int] = (16, 2000)
    output_range: tuple[int, int] = (16, 1000)
    stagger_s: float = 5.0  # devices start within this time
    timed: bool = False
    seed: int = 0
    kinds: tuple[DeviceKind, ...] = ()
    speed_sigma: float = 0.15
    throttling: Throttling | None = None
    think_s: float = 0.0

    @property
    def mean_session_s(self) -> float:
        """Seconds of a session of mean lengths in the loosest class, at exactly the pace of its SLO."""
        stretch = math.exp(self.length_sigma**2 / 2.0)  # the mean of a lognormal against its median
        loosest = max(range(len(self.classes)), key=lambda index: self.slo(index, 0).tpot_ms)
        slo = self.slo(loosest, round(stretch * self.median_prompt_tokens))
        return (slo.ttft_ms + stretch * self.median_output_tokens * slo.tpot_ms) / 1e3

    def devices(self) -> list[Device]:
        """All devices."""
        return [self._device(index) for index in range(self.num_devices)]

    def _device(self, index: int) -> Device:
        rng = np.random.default_rng((self.seed, index, 0))
        if self.kinds:
            speed = self._kind(index).drafted_tokens_per_s * math.exp(self.speed_sigma * rng.standard_normal())
        else:
            slowest, fastest = self.drafted_tokens_per_s
            speed = math.exp(rng.uniform(math.log(slowest), math.log(fastest)))
        device = Device(index, speed, rng.uniform(*self.rtt_s), self.jitter_s, rng.uniform(0.0, self.stagger_s))
        if self.throttling is None:
            return device
        episodes_s = self.throttling.episodes(np.random.default_rng((self.seed, index, 2)))
        return replace(device, episodes_s=episodes_s, hot_factor=self.throttling.factor)

    def _kind(self, index: int) -> DeviceKind:
        """The device's kind: multiples of the golden ratio fall evenly on the shares."""
        shares = np.cumsum([kind.share for kind in self.kinds])
        at = (0.5 + _GOLDEN * (index + 7 * (self.seed % _SEED_PERIOD))) % 1.0
        return self.kinds[int(np.searchsorted(shares, at * shares[-1], side="right"))]

    def sessions(self, device: Device) -> Iterator[SessionSpec]:
        """The device's sessions in their order."""
        rng = np.random.default_rng((self.seed, device.index, 1))
        shares = np.array([c.share for c in self.classes])
        start_s: float | None = device.first_start_s
        for i in range(_MAX_SESSIONS):
            class_index = int(rng.choice(len(self.classes), p=shares / shares.sum()))
            prompt_len = self._length(rng, self.median_prompt_tokens, self.prompt_range)
            num_output_tokens = self._length(rng, self.median_output_tokens, self.output_range)
            slo = self.slo(class_index, prompt_len)
            number = device.index * _MAX_SESSIONS + i
            link_seed = int(rng.integers(1 << 62))
            think_s = float(rng.exponential(self.think_s)) if self.think_s else 0.0
            yield SessionSpec(
                number, device.index, class_index, slo, prompt_len, num_output_tokens, start_s, link_seed, think_s
            )
            if self.timed and start_s is not None:
                start_s += think_s + (slo.ttft_ms + (num_output_tokens - 1) * slo.tpot_ms) / 1e3
            else:
                start_s = None

    def slo(self, class_index: int, prompt_len: int) -> Slo:
        """The SLO of a session of a class with a prompt of `prompt_len` tokens."""
        slo_class = self.classes[class_index]
        tpot_s = slo_class.tpot_passes * self.unloaded_pass_s
        ttft_s = self.ttft_tpots * tpot_s + self.prefill_allowance_s * prompt_len
        return Slo(ttft_ms=1e3 * ttft_s, tpot_ms=1e3 * tpot_s, name=slo_class.name)

    def _length(self, rng: np.random.Generator, median: int, bounds: tuple[int, int]) -> int:
        return int(np.clip(round(rng.lognormal(math.log(median), self.length_sigma)), *bounds))
