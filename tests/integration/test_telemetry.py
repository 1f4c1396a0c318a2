"""What Triton's metrics endpoint and the trace file tell about sessions that ran."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.live import Drafting, run_session
from tests.integration.conftest import ServerFactory
from tests.integration.support import prompts, thin_open, wait_until
from triton_models.server_process import ServerFailed, ServerProcess
from wisp_plugin.telemetry import Telemetry

pytestmark = pytest.mark.integration
NUM_TOKENS = 24
_SAMPLE = re.compile(r"^(wisp_\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)
_TYPE = re.compile(r"^# TYPE (wisp_\w+) (\w+)$", re.MULTILINE)


def exposition(server: ServerProcess) -> str:
    """What the endpoint says now."""
    with urllib.request.urlopen(server.metrics_url, timeout=5.0) as response:
        return str(response.read().decode())


def samples(text: str) -> dict[str, float]:
    """Value of every series by name and labels, as printed."""
    return {name + labels: float(value) for name, labels, value in _SAMPLE.findall(text)}


def check_histograms(found: dict[str, float]) -> None:
    """Every bucket series is cumulative and ends with the count."""
    buckets: dict[str, list[tuple[float, float]]] = {}
    for series, value in found.items():
        if "_bucket{" in series:
            le = re.search(r'le="([^"]+)"', series)
            assert le is not None
            key = re.sub(r',?le="[^"]+"', "", series).replace("{}", "").replace("_bucket", "_count").replace("{,", "{")
            buckets.setdefault(key, []).append((float(le[1]), value))
    assert buckets
    for key, points in buckets.items():
        counts = [count for _, count in sorted(points)]
        assert sorted(points)[-1][0] == float("inf")
        assert counts == sorted(counts), key
        assert counts[-1] == found[key], key


def test_metrics_and_trace_of_a_session_with_drafts_and_a_thin_one(
    make_own_server: ServerFactory, drafting: Callable[..., Drafting], tmp_path: Path
) -> None:
    path = tmp_path / "passes.jsonl"
    with make_own_server({"trace_file": str(path), "slo_classes": "relaxed=60000/10000"}) as server:
        opened = thin_open(prompts()[0], NUM_TOKENS)
        result = run_session(server.grpc_url, opened, drafting("int8"))
        thin = run_session(server.grpc_url, thin_open(prompts()[1], NUM_TOKENS), Drafting())
        ended = 'wisp_sessions_ended_total{met="%s",slo="custom"}'
        wait_until(lambda: sum(samples(exposition(server))[ended % met] for met in ("true", "false")) == 2, 5.0)
        # Totals are told at once, histograms up to a second later.
        wait_until(lambda: has_all_passes(samples(exposition(server))), 5.0)
        text = exposition(server)
    found = samples(text)
    families = {family.name: family.kind.value for family in Telemetry().families()}
    assert dict(_TYPE.findall(text)) == families
    num_committed = len(result.tokens) + len(thin.tokens)
    assert found["wisp_committed_tokens_total"] == num_committed == 2 * NUM_TOKENS
    assert 0 < found["wisp_accepted_tokens_total"] <= found["wisp_verified_tokens_total"]
    assert found["wisp_verified_tokens_total"] <= found["wisp_received_tokens_total"]
    assert found["wisp_pass_sessions_count"] == found["wisp_passes_total"]
    assert found["wisp_pass_new_tokens_sum"] == found["wisp_new_tokens_total"]
    assert found["wisp_pass_accepted_tokens_sum"] == found["wisp_accepted_tokens_total"]
    assert found["wisp_pass_measured_seconds_sum"] == pytest.approx(found["wisp_pass_seconds_total"])
    assert found["wisp_slack_seconds_count"] == found["wisp_passes_total"]  # one session at a time
    assert 0.1 < found["wisp_pass_time_ratio_sum"] / found["wisp_pass_time_ratio_count"] < 10.0
    assert found['wisp_first_token_seconds_count{slo="custom"}'] == 2
    assert found['wisp_sessions{state="lingering"}'] == 2
    assert found['wisp_sessions_drafting{state="working"}'] == 0  # both have left
    assert found['wisp_kv_blocks{state="used"}'] == 0
    assert found['wisp_kv_blocks{state="free"}'] == 8_192 / 32
    check_histograms(found)
    check_trace(path, found, opened.session)


def has_all_passes(found: dict[str, float]) -> bool:
    """Whether the histograms have what the totals have."""
    return found["wisp_pass_sessions_count"] == found["wisp_passes_total"]


def check_trace(path: Path, found: dict[str, float], session: str) -> None:
    """One line per pass; together they are the totals."""
    text = path.read_text(encoding="utf-8")
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert [line["pass"] for line in lines] == list(range(1, int(found["wisp_passes_total"]) + 1))
    items = [item for line in lines for item in line["items"]]
    for key, name in (
        ("committed", "committed_tokens"), ("accepted", "accepted_tokens"), ("drafts", "verified_tokens"),
        ("new", "new_tokens"),
    ):  # fmt: skip
        assert sum(item[key] for item in items) == found[f"wisp_{name}_total"], key
    assert sum(line["measured_s"] for line in lines) == pytest.approx(found["wisp_pass_seconds_total"], abs=1e-3)
    assert session[:8] in {item["session"] for item in items}
    assert session not in text, "the trace tells a capability"


def test_a_trace_that_cannot_be_written_is_refused_in_one_line(make_own_server: ServerFactory, tmp_path: Path) -> None:
    server = make_own_server({"trace_file": str(tmp_path / "missing" / "passes.jsonl")})
    server.start()
    with pytest.raises(ServerFailed, match=r"trace_file .* cannot be written: No such file or directory") as failed:
        server.wait_ready()
    assert "\n" not in str(failed.value)
