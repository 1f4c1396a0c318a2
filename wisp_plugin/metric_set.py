"""Every metric beside `telemetry.Totals`, with names and units by Prometheus convention. Help texts are definitions."""

from __future__ import annotations

from collections.abc import Sequence

from wisp_plugin.metrics import Counter, Family, Gauge, Histogram, Metric

MIN_JUDGED_DRAFTS = 32  # draft tokens of a session before its drafting is called broken
DRAFTING_STATES = ("none", "working", "rejected", "late", "stale")
SESSION_STATES = ("running", "waiting", "paused", "lingering")
BY_LOAD, BY_SESSIONS, BY_QUEUE = "load", "sessions", "queue"
TRUE, FALSE = "true", "false"

_SESSIONS = (
    "Sessions: running (may take part in the next pass), waiting (sync: for their client's draft), paused (the client "
    "does not acknowledge), lingering (no stream, kept for resumption); the first three are attached to a stream"
)
_DRAFTING = (
    "Attached sessions by what became of their drafts: none (thin client, has never sent a draft token); working; "
    f"rejected ({MIN_JUDGED_DRAFTS} or more verified, none accepted: wrong draft model or tokenizer); late, stale "
    f"(none verified, {MIN_JUDGED_DRAFTS} or more came late or were stale, mostly this: device or network too slow, "
    "or its chain is never right)"
)
_ENDED = (
    "Sessions that left their stream, once each, by SLO class (custom: an SLO in numbers) and by whether the SLO held "
    "up to the last commit; one that got no token counts only if its first token was overdue"
)
_TURN = "behind a session's turns; held: an earlier decision had left the session out since it was ready"


class MetricSet:
    """The metrics as attributes; `families` and `values` in one order, that of their making."""

    def __init__(self, slo_classes: Sequence[str]) -> None:
        """`slo_classes`: every value of the label `slo`."""
        self._all: list[Metric] = []
        self._make_gauges()
        self._make_counters(slo_classes)
        self._make_pass_histograms()
        self._make_session_histograms(slo_classes)

    def families(self) -> list[Family]:
        """All families."""
        return [family for metric in self._all for family in metric.families()]

    def values(self) -> list[float]:
        """Values of all series, in the order of `families`."""
        return [value for metric in self._all for value in metric.values()]

    def _make_gauges(self) -> None:
        self.sessions = self._gauge("sessions", _SESSIONS, state=SESSION_STATES)
        self.drafting = self._gauge("sessions_drafting", _DRAFTING, state=DRAFTING_STATES)
        self.buffered = self._gauge("buffered_draft_tokens", "Draft tokens that wait behind committed tokens")
        self.queue = self._gauge("queue_messages", "Messages that wait for the engine thread")
        self.load = self._gauge("predicted_load_ratio", "Predicted load; above 1 the SLOs of all cannot be kept")
        self.price = self._gauge("price", "Commits displaced by one more draft token, of the newest plan; 0 when idle")
        self.margin = self._gauge("estimator_margin_ratio", "Factor on a predicted time that 5 % of passes exceed")
        self.noise = self._gauge("estimator_noise_ratio", "Usual relative difference of a pass to its prediction")
        self.kv_blocks = self._gauge(
            "kv_blocks", "KV blocks; free ones include those that still hold a prefix", state=("used", "free")
        )

    def _make_counters(self, slo_classes: Sequence[str]) -> None:
        self.ended = self._counter("sessions_ended_total", _ENDED, slo=slo_classes, met=(TRUE, FALSE))
        self.refused = self._counter(
            "requests_refused_total",
            "Requests refused: an open by predicted load or by the number of sessions, any message by a full queue",
            reason=(BY_LOAD, BY_SESSIONS, BY_QUEUE),
        )
        self.turns = self._counter("turns_total", f"Commits {_TURN}", held=(TRUE, FALSE))
        self.turn_tokens = self._counter("turn_tokens_total", f"Tokens committed {_TURN}", held=(TRUE, FALSE))

    def _make_pass_histograms(self) -> None:
        self.pass_sessions = self._histogram(
            "pass_sessions", "Sessions in a pass", (1, 2, 4, 8, 16, 32, 64, 128, 256)
        )  # fmt: skip
        self.pass_new = self._histogram(
            "pass_new_tokens", "Tokens that a pass computes", (1, 4, 16, 64, 128, 256, 512, 1024, 4096)
        )
        self.pass_cached = self._histogram(
            "pass_cached_tokens",
            "Tokens whose KV a pass finds",
            (64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 262144),
        )
        self.pass_accepted = self._histogram(
            "pass_accepted_tokens", "Draft tokens that a pass accepts", (0, 1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.pass_seconds = self._histogram(
            "pass_measured_seconds", "Time of a pass", (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
        )
        self.pass_ratio = self._histogram(
            "pass_time_ratio",
            "Measured over predicted time of a pass",
            (0.5, 0.7, 0.85, 0.95, 1.05, 1.15, 1.3, 1.6, 2.5),
        )
        self.plan_seconds = self._histogram(
            "plan_seconds",
            "Time of a decision about a pass",
            (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 2.5e-2),
        )

    def _make_session_histograms(self, slo_classes: Sequence[str]) -> None:
        self.slack = self._histogram(
            "slack_seconds",
            "Slack of a pass's members when it was planned: until the next token is needed, less the predicted pass",
            (-1.0, -0.3, -0.1, -0.03, 0.0, 0.1, 0.3, 1.0, 3.0),
        )
        self.first_rejection = self._histogram(
            "first_rejection_position",
            "Index of the first rejected token of a verified draft, drafts with a rejection only",
            (0, 1, 2, 3, 4, 6, 8, 12, 16),
        )
        self.first_token = self._histogram(
            "first_token_seconds",
            "From the open to the first token at the client, told when the session leaves",
            (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8),
            slo=slo_classes,
        )
        self.per_token = self._histogram(
            "time_per_token_seconds",
            "Mean time per token behind the first, told when the session leaves",
            (0.01, 0.02, 0.03, 0.045, 0.06, 0.09, 0.15, 0.25, 0.5),
            slo=slo_classes,
        )

    def _gauge(self, name: str, text: str, **labels: Sequence[str]) -> Gauge:
        gauge = Gauge(f"wisp_{name}", text, **labels)
        self._all.append(gauge)
        return gauge

    def _counter(self, name: str, text: str, **labels: Sequence[str]) -> Counter:
        counter = Counter(f"wisp_{name}", text, **labels)
        self._all.append(counter)
        return counter

    def _histogram(self, name: str, text: str, bounds: Sequence[float], **labels: Sequence[str]) -> Histogram:
        histogram = Histogram(f"wisp_{name}", text, bounds, **labels)
        self._all.append(histogram)
        return histogram
