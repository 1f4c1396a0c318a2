"""What `TritonPythonModel` is made of, without a server: settings, the adapter on a fake `pb_utils`, the watcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import ids, make_commit, make_estimator
from tests.fakes import VOCAB_SIZE, FakeVerifier, target_alone
from tests.pb_fakes import FakeFamily, FakeSender, install
from tests.tiny_model import hf_folder
from triton_models.reply_sender import ReplySender
from triton_models.watcher import Watcher
from wisp_plugin.config import SETTINGS_VARIABLE, EngineConfig
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import Costs
from wisp_plugin.messages import Slo
from wisp_plugin.profile import Fingerprint, Measurement, Profile, load_profile
from wisp_plugin.telemetry import Telemetry
from wisp_plugin.unary_engine import UnaryEngine
from wisp_plugin.wire import WireLimits

SLACK_BOUNDS = ("-1", "-0.3", "-0.1", "-0.03", "0", "0.1", "0.3", "1", "3", "+Inf")


@pytest.fixture(scope="module")
def adapter() -> Any:
    """`pb_adapter` and `verifier_model` on a `pb_utils` of our own."""
    install()
    from triton_models import pb_adapter

    return pb_adapter


def make_reply(adapter: Any, watcher: Watcher) -> tuple[Any, FakeSender]:
    """A reply and its sender."""
    sender = FakeSender()
    request = types.SimpleNamespace(get_response_sender=lambda: sender)
    return adapter.TritonReply(request, watcher), sender


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_nothing_is_asked_about_a_request_that_has_ended(adapter: Any, end: str) -> None:
    reply, sender = make_reply(adapter, Watcher(1.0, lambda: None))
    assert not reply.is_cancelled()
    reply.poll()
    reply.send(make_commit(3, 4))
    reply.finish() if end == "finish" else reply.fail("one line")
    reply.poll()  # the watcher may hold it in the list of its running round
    assert sender.ended
    assert len(sender.responses) == 2


def test_a_client_that_left_is_noticed_by_the_watcher(adapter: Any) -> None:
    rounds = threading.Semaphore(0)
    watcher = Watcher(0.01, rounds.release)
    reply, sender = make_reply(adapter, watcher)
    assert not reply.is_cancelled()
    sender.cancelled = True
    watcher.start()
    rounds.acquire(timeout=5.0)
    rounds.acquire(timeout=5.0)
    assert reply.is_cancelled()
    watcher.stop()


def test_only_what_has_changed_is_told_and_the_many_values_less_often(adapter: Any) -> None:
    FakeFamily.told.clear()
    telemetry = Telemetry()
    metrics, looks = adapter.Metrics(telemetry), []
    telemetry.totals.passes = 3.0
    telemetry.metrics.slack.observe(-2.0)
    telemetry.metrics.price.set(0.25)
    metrics.publish(10.0, lambda: looks.append(10.0))
    assert set(FakeFamily.told) == {
        ("wisp_passes_total", 3.0), ("wisp_slack_seconds_sum", -2.0), ("wisp_slack_seconds_count", 1.0),
        ("wisp_price", 0.25), *((f"wisp_slack_seconds_bucket {le}", 1.0) for le in SLACK_BOUNDS),
    }  # fmt: skip
    FakeFamily.told.clear()
    telemetry.totals.passes = 5.0
    telemetry.metrics.slack.observe(-4.0)
    telemetry.metrics.price.set(0.0)
    metrics.publish(10.0 + adapter.PUBLISH_PERIOD_S / 2, lambda: looks.append(10.5))
    assert FakeFamily.told == [("wisp_passes_total", 2.0)]
    metrics.publish(10.0 + adapter.PUBLISH_PERIOD_S, lambda: looks.append(11.0))
    assert {("wisp_slack_seconds_sum", -6.0), ("wisp_slack_seconds_count", 1.0), ("wisp_price", 0.0)} <= set(
        FakeFamily.told
    )
    FakeFamily.told.clear()
    metrics.publish(20.0, lambda: looks.append(20.0))
    assert (FakeFamily.told, looks) == ([], [10.0, 11.0, 20.0])


def test_the_trace_is_opened_before_anything_is_loaded(adapter: Any, tmp_path: Path) -> None:
    from triton_models.verifier_model import open_trace

    assert open_trace(EngineConfig()) is None
    trace = open_trace(EngineConfig(trace_file=str(tmp_path / "passes.jsonl")))
    assert trace is not None
    trace.close()
    assert (tmp_path / "passes.jsonl").exists()
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        open_trace(EngineConfig(trace_file=str(tmp_path)))


def config(**values: Any) -> dict[str, Any]:
    """A model configuration as Triton hands it over."""
    parameters = {name: {"string_value": str(value)} for name, value in values.items()}
    return {"instance_group": [{"count": 1}], "parameters": parameters}


def test_settings_of_the_launcher_go_over_those_of_the_model(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_models.verifier_model import read_settings

    monkeypatch.setenv(SETTINGS_VARIABLE, json.dumps({"kv_tokens": 4096}))
    ours = config(target="x", kv_tokens=8192, max_sessions=7, EXECUTION_ENV_PATH="env.tar.gz", WISP_PROFILE="x")
    verifier, engine = read_settings(ours)
    assert (verifier.target, verifier.kv_tokens, engine.max_sessions) == ("x", 4096, 7)


@pytest.mark.parametrize(
    ("model_config", "line"),
    [
        (config(kv_token=8192), "unknown parameter 'kv_token'"),
        (config(slo_classes="tight=500"), "'slo_classes' has 'tight=500'; the form is NAME=TTFT_MS/TPOT_MS"),
        (config(max_sessions=0), "'max_sessions' is 0; allowed: 1 to"),
        (config() | {"instance_group": [{"count": 2}]}, "2 instances; allowed: 1"),
        (config() | {"instance_group": [{"count": 1, "gpus": [0, 1]}]}, "2 instances; allowed: 1"),
    ],
)
def test_settings_that_cannot_work_say_why(adapter: Any, model_config: dict[str, Any], line: str) -> None:
    from triton_models.verifier_model import read_settings

    with pytest.raises(ConfigError, match=line):
        read_settings(model_config)


def test_slos_reach_the_wire(adapter: Any) -> None:
    from triton_models.verifier_model import wire_limits

    verifier = types.SimpleNamespace(
        vocab_size=7, max_context_tokens=64, eos_token_ids=(2,), target_dir=str(hf_folder())
    )
    limits = wire_limits(verifier, EngineConfig(ttft_ms=900.0, tpot_ms=90.0, slo_classes="tight=500/60"))  # type: ignore[arg-type]
    assert limits.default_slo == Slo(900.0, 90.0, "default")
    assert limits.slo_classes == {"tight": Slo(500.0, 60.0, "tight")}


class FakeRequest:
    """A unary request as Triton hands it over."""

    def __init__(self, *tokens: int, **parameters: Any) -> None:
        self._tokens, self._parameters = np.array([tokens], np.int32), parameters

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def inputs(self) -> list[Any]:
        return [types.SimpleNamespace(name=lambda: "TOKENS", as_numpy=lambda: self._tokens)]


def unary_engine(on_run: Callable[[], None] = lambda: None) -> tuple[UnaryEngine, WireLimits]:
    """An engine on the fake verifier, and what it accepts."""
    verifier, limits = FakeVerifier(on_run=on_run), WireLimits(VOCAB_SIZE, 64, max_draft_ahead=8)
    return UnaryEngine(verifier, verifier.pool, limits, EngineConfig(), make_estimator()), limits


def test_a_malformed_request_of_a_batch_harms_no_other(adapter: Any) -> None:
    engine, limits = unary_engine()
    bad = [FakeRequest(1, VOCAB_SIZE), FakeRequest(1, seeed=1), FakeRequest(3, seed=-1)]
    answers = adapter.answer_batch(engine, [FakeRequest(1, 2), *bad[:2], FakeRequest(3), bad[2]], limits)
    errors = [error and error[0] for _, error in answers]
    assert [bool(error) for error in errors] == [False, True, True, False, True]
    assert errors[1] == f"tensor 'TOKENS' has token id {VOCAB_SIZE} at 1; allowed: 0 to {VOCAB_SIZE - 1}"
    assert {error[1] for _, error in answers if error} == {"invalid"}
    tokens = [dict(outputs)["NEXT_TOKENS"].tolist() for outputs, error in answers if not error]
    assert tokens == [[target_alone(ids(1, 2), 3)[2:]], [target_alone(ids(3), 2)[1:]]]


def test_an_engine_that_fails_answers_everybody_in_one_line(adapter: Any) -> None:
    def fail() -> None:
        raise RuntimeError("no memory\nat all")

    engine, limits = unary_engine(fail)
    answers = adapter.answer_batch(engine, [FakeRequest(1, 2), FakeRequest(-1), FakeRequest(3)], limits)
    line = "unavailable: the verifier has failed: RuntimeError: no memory at all"
    assert [error for _, error in answers] == [(line, "unavailable")] * 3


@pytest.mark.parametrize("allows_unloading", [True, False])
def test_a_failed_engine_is_withdrawn_behind_its_last_answers(
    adapter: Any, monkeypatch: pytest.MonkeyPatch, allows_unloading: bool
) -> None:
    from triton_models import verifier_model

    said: list[str] = []

    def unload(model_name: str) -> None:
        said.append(f"unload {model_name}")
        if not allows_unloading:
            raise RuntimeError("explicit model control is off")

    monkeypatch.setattr(adapter, "unload", unload)
    monkeypatch.setattr(os, "_exit", lambda code: said.append(f"exit {code}"))
    sender = ReplySender()
    reply = types.SimpleNamespace(fail=lambda line: (time.sleep(0.1), said.append(line)))
    sender.wrap(reply, "x").fail("unavailable: the verifier has failed")  # type: ignore[arg-type]
    verifier_model._leave("wisp_verifier", sender)
    ended = [] if allows_unloading else ["exit 1"]
    assert said == ["unavailable: the verifier has failed", "unload wisp_verifier", *ended]


def test_a_target_from_the_hub_brings_its_tokenizer(tmp_path: Path) -> None:
    """A hub id, found in the hub client's cache as after a download, with the network off."""
    cached = tmp_path / "hub" / "models--wisp--tiny"
    shutil.copytree(hf_folder(), cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    script = (
        "import sys, types; sys.modules['triton_python_backend_utils'] = types.SimpleNamespace(\n"
        "  TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)\n"
        "from triton_models.verifier_model import load_verifier, wire_limits\n"
        "from wisp_plugin.config import EngineConfig, VerifierConfig\n"
        "verifier = load_verifier(VerifierConfig(target='wisp/tiny'))\n"
        "print(wire_limits(verifier, EngineConfig()).vocab_hash)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.split()[-1]) == 64


def test_the_batching_strategy_gets_the_profile_that_was_measured(adapter: Any, tmp_path: Path) -> None:
    from triton_models.batched_model import share_profile

    how = Measurement(10, 1, 0.0, 0.0, 1.0, "now", "test")
    one, other = (
        Profile(Fingerprint("m", "", "float32", name, 0, {}), Costs((1e-3,) * 6, (0.0,) * 6), 1.1, 0.1, how)
        for name in ("cpu", "gpu")
    )
    path = tmp_path / "wisp_profile.json"
    share_profile(one, path)
    written = path.stat().st_mtime_ns
    share_profile(one, path)
    assert path.stat().st_mtime_ns == written  # what has not changed is not read anew
    share_profile(other, path)
    assert load_profile(path) == other
    share_profile(one, tmp_path / "wisp_profile.json" / "nowhere")  # not fatal: the strategy keeps what it has
    assert load_profile(path) == other
