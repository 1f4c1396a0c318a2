"""What `TritonPythonModel` is made of, without a server: settings, the adapter on a fake `pb_utils`, the watcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from tests.factories import make_commit
from tests.tiny_model import hf_folder
from triton_models.watcher import Watcher
from wisp_plugin.config import SETTINGS_VARIABLE
from wisp_plugin.errors import ConfigError

FINAL = 1


class FakeSender:
    """A response sender that, like Triton's, must not be asked about a request after its final flag."""

    def __init__(self) -> None:
        self.responses: list[Any] = []
        self.ended = False
        self.cancelled = False

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.ended, "a response after the final flag"
        self.responses.append(response)
        self.ended = bool(flags & FINAL)

    def is_cancelled(self) -> bool:
        assert not self.ended, "a question after the final flag frees what it is about"
        return self.cancelled


@pytest.fixture(scope="module")
def adapter() -> Any:
    """`pb_adapter` and `verifier_model` on a `pb_utils` of our own."""
    fake = types.ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    fake.Tensor = lambda name, array: (name, array)  # type: ignore[attr-defined]
    fake.TritonError = str  # type: ignore[attr-defined]
    fake.InferenceResponse = lambda output_tensors=None, error=None: (output_tensors, error)  # type: ignore[attr-defined]
    sys.modules["triton_python_backend_utils"] = fake
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


def config(**values: Any) -> dict[str, Any]:
    """A model configuration as Triton hands it over."""
    parameters = {name: {"string_value": str(value)} for name, value in values.items()}
    return {"instance_group": [{"count": 1}], "parameters": parameters}


def test_settings_of_the_launcher_go_over_those_of_the_model(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_models.verifier_model import read_settings

    monkeypatch.setenv(SETTINGS_VARIABLE, json.dumps({"kv_tokens": 4096}))
    ours = config(target="x", kv_tokens=8192, max_sessions=7, EXECUTION_ENV_PATH="env.tar.gz")
    verifier, engine = read_settings(ours)
    assert (verifier.target, verifier.kv_tokens, engine.max_sessions) == ("x", 4096, 7)


@pytest.mark.parametrize(
    ("model_config", "line"),
    [
        (config(kv_token=8192), "unknown parameter 'kv_token'"),
        (config(max_sessions=0), "'max_sessions' is 0; allowed: 1 to"),
        (config() | {"instance_group": [{"count": 2}]}, "2 instances; allowed: 1"),
        (config() | {"instance_group": [{"count": 1, "gpus": [0, 1]}]}, "2 instances; allowed: 1"),
    ],
)
def test_settings_that_cannot_work_say_why(adapter: Any, model_config: dict[str, Any], line: str) -> None:
    from triton_models.verifier_model import read_settings

    with pytest.raises(ConfigError, match=line):
        read_settings(model_config)


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
