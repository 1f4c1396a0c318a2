"""What the gateway counts: TGI's metrics under TGI's names, and what the device's drafting is worth under ours."""

from __future__ import annotations

from collections.abc import Iterator

from edge_runtime.gateway.generation import EOS, LENGTH, STOP, Generation
from edge_runtime.gateway.sessions import Sessions
from wisp_plugin.metrics import Counter, Family, Gauge, Histogram, Metric

FAILURES = ("validation", "bad_request", "generation", "overloaded", "unhealthy", "internal", "hangup")
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
_BUCKET = "_bucket"


class GatewayMetrics:
    """Written from the event loop alone."""

    def __init__(self) -> None:
        self._all: list[Metric] = []
        counter, histogram = self._counter, self._histogram
        self.requests = counter("tgi_request_count", "Requests for text")
        self.success = counter("tgi_request_success", "Answered to the end, by reason", reason=(LENGTH, EOS, STOP))
        self.failures = counter("tgi_request_failure", "Not answered to the end, by cause", err=FAILURES)
        self.duration = histogram("tgi_request_duration", "Seconds from arrival to the last token", _SECONDS)
        self.validation = histogram("tgi_request_validation_duration", "Seconds to check and to tokenize", _SECONDS)
        self.queue = histogram("tgi_request_queue_duration", "Seconds of waiting for a session", _SECONDS)
        self.inference = histogram("tgi_request_inference_duration", "Seconds from session to last token", _SECONDS)
        self.first = histogram("wisp_edge_first_token_duration", "Seconds from arrival to the first token", _SECONDS)
        self.per_token = histogram("tgi_request_mean_time_per_token_duration", "Inference seconds per token", _SECONDS)
        self.input_length = histogram("tgi_request_input_length", "Tokens of the prompt", _TOKENS)
        self.generated = histogram("tgi_request_generated_tokens", "Generated tokens", _TOKENS)
        self.wanted = histogram("tgi_request_max_new_tokens", "Tokens asked for", _TOKENS)
        self.batch_size = self._gauge("tgi_batch_current_size", "Sessions that run")
        self.queue_size = self._gauge("tgi_queue_size", "Requests that wait for a session")
        self.seated = self._gauge("wisp_edge_seated_sessions", "Sessions that have the use of a drafter now")
        self._add_drafting()

    def _add_drafting(self) -> None:
        self.committed = self._counter("wisp_edge_committed_tokens_total", "Tokens that commits brought")
        self.commits = self._counter("wisp_edge_commits_total", "Commits that brought tokens")
        self.drafted = self._counter("wisp_edge_drafted_tokens_total", "Draft tokens made")
        self.accepted = self._counter("wisp_edge_accepted_tokens_total", "Draft tokens accepted")
        self.corrections = self._counter("wisp_edge_corrections_total", "Commits that ended with a correction")
        self.reopened = self._counter("wisp_edge_reopened_total", "Sessions resumed over a new connection")
        self.drafting = self._counter("wisp_edge_drafting_seconds_total", "Drafting time, waits for the turn included")
        self.useful = self._counter("wisp_edge_useful_drafting_seconds_total", "Drafting time of accepted tokens")

    def on_request(self, generation: Generation) -> None:
        """A request has a session."""
        times = generation.times
        self.validation.observe(times.validated_s - times.arrived_s)
        self.queue.observe(times.started_s - times.validated_s)
        self.input_length.observe(len(generation.request.prompt))
        self.wanted.observe(generation.request.max_new_tokens)

    def on_end(self, generation: Generation) -> None:
        """A request's session is over, however it ended."""
        times, stats = generation.times, generation.stats
        self.generated.observe(generation.num_tokens)
        if generation.num_tokens:
            self.first.observe(times.first_s - times.arrived_s)
        if generation.finish is not None:
            self.success.add(1, generation.finish)
            self.duration.observe(times.ended_s - times.arrived_s)
            self.inference.observe(times.ended_s - times.started_s)
            self.per_token.observe((times.ended_s - times.started_s) / max(1, generation.num_tokens))
        self.committed.add(stats.num_committed)
        self.commits.add(stats.num_commits)
        self.drafted.add(stats.num_drafted)
        self.accepted.add(stats.num_accepted)
        self.corrections.add(stats.num_corrections)
        self.reopened.add(stats.num_reopened)
        self.drafting.add(stats.drafting_s)
        self.useful.add(stats.useful_drafting_s)

    def text(self, sessions: Sessions) -> str:
        """All of it in Prometheus' text format."""
        self.batch_size.set(len(sessions.running))
        self.queue_size.set(sessions.num_waiting)
        speculation = sessions.device.speculation
        self.seated.set(speculation.dealer.num_seated if speculation else 0)
        return "\n".join(line for metric in self._all for line in _lines(metric)) + "\n"

    def _counter(self, name: str, text: str, **labels: tuple[str, ...]) -> Counter:
        self._all.append(metric := Counter(name, text, **labels))
        return metric

    def _gauge(self, name: str, text: str) -> Gauge:
        self._all.append(metric := Gauge(name, text))
        return metric

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        self._all.append(metric := Histogram(name, text, bounds))
        return metric


def _lines(metric: Metric) -> Iterator[str]:
    families, values = metric.families(), iter(metric.values())
    first = families[0]
    is_histogram = len(families) > 1
    name = first.name.removesuffix(_BUCKET) if is_histogram else first.name
    text = first.help.removesuffix(": values up to le") if is_histogram else first.help
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {'histogram' if is_histogram else first.kind.value}"
    for family in families:
        for labels in family.labels:
            yield f"{family.name}{_label_text(family, labels)} {next(values):.10g}"


def _label_text(family: Family, labels: object) -> str:
    assert isinstance(labels, dict), family
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}" if labels else ""
