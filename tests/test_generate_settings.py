"""Settings of `wisp_generate`, and its answers as Triton gets them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from tests.pb_fakes import FakeSender, install
from triton_models.generate_session import Ending, Failure
from triton_models.generate_settings import GenerateConfig, read_generate_settings, tokenizer_folder
from triton_models.text_tokenizer import TextTokenizer
from triton_models.watcher import Watcher
from wisp_plugin.config import SETTINGS_VARIABLE
from wisp_plugin.errors import ConfigError, ModelError


def test_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {"parameters": {"lookup": {"string_value": "off"}, "max_sessions": {"string_value": "3"}}}
    # Those of the launcher are the verifier's: only what both have counts here.
    monkeypatch.setenv(SETTINGS_VARIABLE, '{"target": "some/model", "max_sessions": 9, "kv_tokens": 64}')
    assert read_generate_settings(config) == GenerateConfig(target="some/model", lookup="off", max_sessions=3)
    for name, value, message in (
        ("lookup", "on", "'lookup' is 'on'; allowed: auto, off"),
        ("max_sessions", "0", "'max_sessions' is 0"),
        ("frob", "1", "unknown parameter 'frob'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_generate_settings({"parameters": {name: {"string_value": value}}})
    with pytest.raises(ModelError, match="an emulated target has no tokenizer"):
        tokenizer_folder("emulated:profile.json")
    assert tokenizer_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        TextTokenizer(tmp_path)


@pytest.fixture
def pb_generate() -> Any:
    """`pb_generate` on a `pb_utils` of our own."""
    install()
    from triton_models import pb_generate

    return pb_generate


def test_answers_as_triton_gets_them(pb_generate: Any) -> None:
    sender = FakeSender()
    request = types.SimpleNamespace(get_response_sender=lambda: sender)
    reply = pb_generate.TextReply(request, Watcher(1.0, lambda: None))
    reply.send("é")
    reply.finish(Ending("!", "length", 3, 2, 2**62))
    (first, _), (last, _) = sender.responses
    assert [(name, array.tolist()) for name, array in first] == [("text_output", ["é".encode()])]
    assert {name: (array.dtype.kind, array.tolist()) for name, array in last} == {
        "text_output": ("O", [b"!"]), "finish_reason": ("O", [b"length"]), "num_input_tokens": ("i", [3]),
        "num_output_tokens": ("i", [2]), "seed": ("i", [2**62]),
    }  # fmt: skip
    assert sender.ended
    sender = FakeSender()
    pb_generate.TextReply(request, Watcher(1.0, lambda: None)).fail(Failure("no", is_ours=True))
    assert sender.responses == [([], ("no", "unavailable"))]
