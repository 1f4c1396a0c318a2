"""Configuration: converted, bounded, and nothing unknown."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from wisp_plugin.config import EngineConfig, VerifierConfig, from_mapping
from wisp_plugin.edge_session import ACK_TOKENS
from wisp_plugin.errors import ConfigError


@pytest.mark.parametrize("kind", [VerifierConfig, EngineConfig])
def test_every_field_has_a_default_that_is_allowed(kind: type[Any]) -> None:
    config = from_mapping(kind, {})
    assert config == kind()
    assert from_mapping(kind, dataclasses.asdict(config)) == config


@pytest.mark.parametrize("kind", [VerifierConfig, EngineConfig])
def test_text_is_converted_to_the_type_of_the_field(kind: type[Any]) -> None:
    config = from_mapping(kind, {name: str(value) for name, value in dataclasses.asdict(kind()).items()})
    assert config == kind()
    assert all(type(getattr(config, f.name)) is type(getattr(kind(), f.name)) for f in dataclasses.fields(kind))


def test_whole_floats_are_whole_numbers() -> None:
    assert from_mapping(EngineConfig, {"max_sessions": 3.0}).max_sessions == 3


BAD: list[tuple[type[Any], dict[str, Any], tuple[str, ...]]] = [
    (EngineConfig, {"max_session": 1}, ("unknown parameter 'max_session'", "max_sessions", "linger_s")),
    (EngineConfig, {"two\nlines": 1}, ("unknown parameter", "max_sessions")),
    (EngineConfig, {"max_sessions": "many"}, ("'max_sessions' must be int", "'many'")),
    (EngineConfig, {"max_sessions": 1.5}, ("'max_sessions' must be int", "1.5")),
    (EngineConfig, {"max_sessions": None}, ("'max_sessions' must be int", "None")),
    (EngineConfig, {"max_sessions": float("inf")}, ("'max_sessions' must be int", "inf")),
    (EngineConfig, {"max_sessions": 0}, ("'max_sessions' is 0", "1 to")),
    (EngineConfig, {"max_pass_tokens": -1}, ("'max_pass_tokens' is -1", "1 to")),
    (EngineConfig, {"max_pass_sessions": 0}, ("'max_pass_sessions' is 0", "1 to")),
    (EngineConfig, {"max_draft_ahead": 0}, ("'max_draft_ahead' is 0", "1 to")),
    (EngineConfig, {"max_queued_messages": 0}, ("'max_queued_messages' is 0", "1 to")),
    (EngineConfig, {"max_unacked_tokens": 127}, ("'max_unacked_tokens' is 127", "128 to")),
    (EngineConfig, {"linger_s": "nan"}, ("'linger_s' is nan", "0.001 to")),
    (EngineConfig, {"linger_s": "soon"}, ("'linger_s' must be float", "'soon'")),
    (EngineConfig, {"ttft_ms": 0}, ("'ttft_ms' is 0.0", "0.001 to")),
    (EngineConfig, {"tpot_ms": 1e8}, ("'tpot_ms' is 100000000.0", "to 10000000.0")),
    (EngineConfig, {"cancel_poll_s": 0.6}, ("'cancel_poll_s' is 0.6", "0.01 to 0.5")),
    (VerifierConfig, {"dtype": "int8"}, ("'dtype' is 'int8'", "auto, float32, bfloat16, float16")),
    (VerifierConfig, {"kv_block_tokens": 0}, ("'kv_block_tokens' is 0", "1 to 1024")),
    (VerifierConfig, {"kv_block_tokens": 32, "kv_tokens": 63}, ("'kv_tokens' is 63", "64 to")),
    (VerifierConfig, {"num_threads": -1}, ("'num_threads' is -1", "0 to")),
]


@pytest.mark.parametrize(("kind", "mapping", "says"), BAD)
def test_what_cannot_work_is_refused_in_one_line(
    kind: type[Any], mapping: dict[str, Any], says: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(kind, mapping)
    assert [text for text in says if text not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_a_number_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(ConfigError, match="linger_s"):
        from_mapping(EngineConfig, {"linger_s": 10**400})


@pytest.mark.parametrize(("text", "value"), [("true", True), ("on", True), ("1", True), ("No", False), (False, False)])
def test_truth_values(text: Any, value: bool) -> None:
    @dataclasses.dataclass
    class Switch:
        on: bool = False

    assert Switch.__annotations__ == {"on": "bool"}
    assert from_mapping(Switch, {"on": text}).on is value
    with pytest.raises(ConfigError, match="'on' must be bool, not 'maybe'"):
        from_mapping(Switch, {"on": "maybe"})


def test_a_thin_client_acknowledges_before_it_is_paused() -> None:
    with pytest.raises(ConfigError):
        EngineConfig(max_unacked_tokens=2 * ACK_TOKENS - 1)
    EngineConfig(max_unacked_tokens=2 * ACK_TOKENS)
