"""Configuration: converted, bounded, and nothing unknown."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisp_plugin.config import EngineConfig, VerifierConfig, check_slo_class, from_mapping, parse_slo_classes
from wisp_plugin.controller import MAX_AHEAD
from wisp_plugin.edge_session import ACK_TOKENS
from wisp_plugin.errors import ConfigError
from wisp_plugin.messages import Slo
from wisp_plugin.prompt_lookup import MAX_DRAFT_TOKENS


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
    (EngineConfig, {"max_draft_ahead": 63}, ("'max_draft_ahead' is 63", "64 to 4096")),
    (EngineConfig, {"max_queued_messages": 0}, ("'max_queued_messages' is 0", "1 to")),
    (EngineConfig, {"max_unacked_tokens": 127}, ("'max_unacked_tokens' is 127", "128 to")),
    (EngineConfig, {"linger_s": "nan"}, ("'linger_s' is nan", "0.001 to")),
    (EngineConfig, {"linger_s": "soon"}, ("'linger_s' must be float", "'soon'")),
    (EngineConfig, {"ttft_ms": 0}, ("'ttft_ms' is 0.0", "0.001 to")),
    (EngineConfig, {"tpot_ms": 1e8}, ("'tpot_ms' is 100000000.0", "to 10000000.0")),
    (EngineConfig, {"cancel_poll_s": 0.6}, ("'cancel_poll_s' is 0.6", "0.01 to 0.5")),
    (EngineConfig, {"max_load": -0.1}, ("'max_load' is -0.1", "0.0 to 100.0")),
    (EngineConfig, {"max_load": 101}, ("'max_load' is 101.0", "0.0 to 100.0")),
    (EngineConfig, {"static_batch_sessions": 0}, ("'static_batch_sessions' is 0", "1 to")),
    (EngineConfig, {"static_batch_wait_ms": -1}, ("'static_batch_wait_ms' is -1.0", "0.0 to 60000.0")),
    (EngineConfig, {"static_batch_wait_ms": "nan"}, ("'static_batch_wait_ms' is nan", "0.0 to")),
    (EngineConfig, {"prefix_sharing": "perhaps"}, ("'prefix_sharing' must be bool", "'perhaps'")),
    (EngineConfig, {"slo_classes": "tight=0/1"}, ("ttft_ms of tight' is 0.0", "0.001 to")),
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


def test_a_server_allows_what_our_devices_draft() -> None:
    with pytest.raises(ConfigError):
        EngineConfig(max_draft_ahead=MAX_AHEAD - 1)
    EngineConfig(max_draft_ahead=MAX_AHEAD)
    assert MAX_DRAFT_TOKENS <= MAX_AHEAD


# -- SLO classes ------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9_-]{0,31}", fullmatch=True).filter(lambda name: name not in ("default", "custom"))
times_ms = st.floats(0.001, 1e7)


def test_slo_classes() -> None:
    classes = parse_slo_classes("interactive=500/60, relaxed = 3000 / 2.5e2")
    assert classes == {"interactive": Slo(500.0, 60.0, "interactive"), "relaxed": Slo(3000.0, 250.0, "relaxed")}
    assert list(classes) == ["interactive", "relaxed"]
    assert parse_slo_classes("") == parse_slo_classes(" ") == {}


@given(
    st.dictionaries(names, st.tuples(times_ms, times_ms), min_size=1, max_size=16), st.sampled_from([",", ", ", " , "])
)
def test_slo_classes_come_back_as_they_were_written(numbers: dict[str, tuple[float, float]], comma: str) -> None:
    text = comma.join(f"{name}={ttft_ms!r}/{tpot_ms!r}" for name, (ttft_ms, tpot_ms) in numbers.items())
    assert parse_slo_classes(text) == {name: Slo(*both, name) for name, both in numbers.items()}
    assert from_mapping(EngineConfig, {"slo_classes": text}).slo_classes == text


BAD_CLASSES = {
    "a": "has 'a'; the form is NAME=TTFT_MS/TPOT_MS",
    "a=1": "has 'a=1'; the form is",
    "a=1/2/3": "the form is",
    "a=1/2=3": "the form is",
    "a=1/two": "the form is",
    "a=1/2,": "has ''; the form is",
    "a=1/2 b=3/4": "the form is",
    "a=1/2,a=3/4": "has 'a' twice",
    "=1/2": "SLO class ''; allowed: a lower-case letter",
    "Fast=1/2": "SLO class 'Fast'; allowed",
    "9=1/2": "SLO class '9'; allowed",
    "two words=1/2": "SLO class 'two words'; allowed",
    "a\nb=1/2": r"SLO class 'a\nb'; allowed",
    "a" * 33 + "=1/2": "up to 31 of",
    "default=1/2": "names 'default', which is taken",
    "custom=1/2": "names 'custom', which is taken",
    "a=0/2": "ttft_ms of a' is 0.0; allowed: 0.001 to",
    "a=1/1e8": "tpot_ms of a' is 100000000.0; allowed: 0.001 to",
    "a=nan/1": "ttft_ms of a' is nan",
    "a=1/inf": "tpot_ms of a' is inf",
    ",".join(f"a{i}=1/2" for i in range(17)): "has 17 classes; allowed: 16",
}


@pytest.mark.parametrize("text", BAD_CLASSES)
def test_bad_slo_classes(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(slo_classes=text)
    assert BAD_CLASSES[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_form_of_a_class_name() -> None:
    for name in ("a", "tight", "a-b_9", "a" * 32, "default"):
        check_slo_class(name)
    for name in ("", "A", "-a", "a b", "a\n", "a" * 33, "\N{LATIN SMALL LETTER E WITH ACUTE}"):
        with pytest.raises(ConfigError, match="SLO class"):
            check_slo_class(name)
