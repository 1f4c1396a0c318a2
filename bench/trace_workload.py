"""One device that goes through recorded texts, one session behind the other (see `scenario.Scenario.tokens`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.sim_client import TraceTokens
from bench.workload import Device, SessionSpec, SloClass, Workload
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.messages import Slo


@dataclass(frozen=True, slots=True)
class TraceWorkload(Workload):
    """All texts of `trace` on one device. `tpot_s` is the pace that every session asks for."""

    trace: DraftTrace = field(kw_only=True)
    draft_s: float = field(kw_only=True)
    link_rtt_s: float = field(kw_only=True)
    tpot_s: float = field(kw_only=True)
    num_devices: int = 1
    classes: tuple[SloClass, ...] = (SloClass("trace", 1.0),)

    def devices(self) -> list[Device]:
        """The one device."""
        return [Device(0, 1.0 / self.draft_s, self.link_rtt_s, self.jitter_s, 0.0)]

    def sessions(self, device: Device) -> Iterator[SessionSpec]:
        """One session per text."""
        slo = Slo(ttft_ms=1e4, tpot_ms=1e3 * self.tpot_s, name="trace")
        for number, text in enumerate(self.trace.texts):
            yield SessionSpec(number, 0, 0, slo, text.prompt_len, len(text.generated), None, number)

    def tokens(self, spec: SessionSpec) -> TraceTokens:
        """What target and draft say in a session."""
        return TraceTokens(self.trace.texts[spec.number])
