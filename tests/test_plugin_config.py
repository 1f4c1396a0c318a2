"""The lines for config.pbtxt: what is written, what stays, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from triton_models.plugin_config import BEGIN, END, PluginSettings, advice, parse, parse_inputs, with_plugin
from wisp_plugin.errors import ConfigError

CONFIG = """\
# kept as it is
name: "mine"
backend: "python"
max_batch_size: 8
input [
  { name: "IDS", data_type: TYPE_INT32, dims: [ -1 ], allow_ragged_batch: true },
  { name: "PAST", data_type: TYPE_INT64, dims: [ 1 ] },
  { name: "TEXT", data_type: TYPE_STRING, dims: [ 1 ] }
]
output [ { name: "OUT", data_type: TYPE_FP32, dims: [ 1 ] } ]
"""
COSTS = {"base_us": 100.0, "per_token_us": 2.5}


def test_the_lines_are_appended_and_the_rest_is_kept() -> None:
    settings = PluginSettings(**COSTS, tokens_input="IDS", context_input="value:PAST", slo_ms=50.0, margin=1.2)
    whole, block = with_plugin(CONFIG, settings)
    assert whole.startswith(CONFIG)
    assert whole.endswith(block)
    parameters = {name: value.string_value for name, value in parse(whole).parameters.items()}
    assert parameters == {
        "WISP_BASE_US": "100",
        "WISP_PER_TOKEN_US": "2.5",
        "WISP_TOKENS_INPUT": "IDS",
        "WISP_CONTEXT_INPUT": "value:PAST",
        "WISP_SLO_MS": "50",
        "WISP_MARGIN": "1.2",
    }


def test_dynamic_batching_is_added_only_where_it_is_missing() -> None:
    settings = PluginSettings(profile="p.json")
    assert "dynamic_batching" in with_plugin(CONFIG, settings)[1]
    own = CONFIG + "dynamic_batching { max_queue_delay_microseconds: 7 }\n"
    whole, block = with_plugin(own, settings)
    assert "dynamic_batching" not in block
    assert parse(whole).dynamic_batching.max_queue_delay_microseconds == 7


def test_a_second_installation_replaces_the_first() -> None:
    first, _ = with_plugin(CONFIG, PluginSettings(profile="p.json", slo_ms=1.0))
    second, _ = with_plugin(first, PluginSettings(**COSTS))
    assert second == with_plugin(CONFIG, PluginSettings(**COSTS))[0]
    assert second.count(BEGIN) == second.count(END) == 1


def test_line_ends_are_those_of_the_file() -> None:
    with_lf, block = with_plugin(CONFIG, PluginSettings(**COSTS))
    with_crlf, printed = with_plugin(CONFIG.replace("\n", "\r\n"), PluginSettings(**COSTS))
    assert with_crlf == with_lf.replace("\n", "\r\n")
    assert printed == block
    assert with_plugin(with_crlf, PluginSettings(**COSTS))[0] == with_crlf


@pytest.mark.parametrize(
    ("value", "text"), [(1_234_567.0, "1234567"), (0.1 + 0.2, "0.30000000000000004"), (1e-7, "1e-07"), (3, "3")]
)
def test_numbers_keep_all_digits(value: float, text: str) -> None:
    written = PluginSettings(base_us=value).parameters()["WISP_BASE_US"]
    assert written == text
    assert float(written) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONFIG.replace("8", "0", 1), "max_batch_size is 0; allowed: 1 or more"),
        (CONFIG + "sequence_batching { }", "has sequence_batching; a batching strategy works with dynamic"),
        (CONFIG + "ensemble_scheduling { }", "has ensemble_scheduling; a batching strategy works with dynamic"),
        (CONFIG + 'parameters { key: "WISP_SLO_MS" value: { string_value: "1" } }', "WISP_SLO_MS outside of WISP's"),
        (CONFIG + "no_such_field: 1", "cannot be read"),
    ],
)
def test_configurations_that_cannot_work_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_plugin(text, PluginSettings(profile="p.json"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give --profile FILE, or --base-us"),
        ({"profile": "p", "base_us": 1.0}, "not both"),
        ({"base_us": 0.0}, "all 0; allowed: one above 0"),
        ({"base_us": -1.0}, "--base-us is -1.0; allowed: a number from 0"),
        ({"base_us": float("nan")}, "--base-us is nan"),
        ({"profile": "p", "slo_ms": 0.0}, "--slo-ms is 0.0; allowed: a number above 0"),
        ({"profile": "p", "margin": float("inf")}, "--margin is inf"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PluginSettings(**values)


@pytest.mark.parametrize(
    ("tokens", "context", "message"),
    [
        ("NOPE", None, "WISP_TOKENS_INPUT names 'NOPE', no input of the model; allowed: IDS, PAST, TEXT"),
        ("IDS,IDS", None, "allowed: NAME or FIRST,SECOND"),
        ("IDS,PAST,TEXT", None, "allowed: NAME or FIRST,SECOND"),
        (None, "value:TEXT", "which is TYPE_STRING; allowed: TYPE_INT32, TYPE_INT64"),
        (None, "value:NOPE", "WISP_CONTEXT_INPUT names 'NOPE'"),
    ],
)
def test_inputs_that_there_are_not_are_refused(tokens: str | None, context: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_inputs(parse(CONFIG), tokens, context)


@pytest.mark.parametrize(("tokens", "context"), [("IDS", None), (None, "value:PAST")])
def test_a_configuration_without_inputs_is_told_to_name_them(tokens: str | None, context: str | None) -> None:
    with pytest.raises(ConfigError, match="names no inputs; add its inputs"):
        parse_inputs(parse("max_batch_size: 8"), tokens, context)


def test_advice_names_what_keeps_the_strategy_from_working() -> None:
    ragged = CONFIG.replace(", allow_ragged_batch: true", "")
    lines = advice(parse(ragged + "dynamic_batching { }"))
    assert ["one queue" in lines[0], "IDS differ in shape" in lines[1]] == [True, True]
    assert advice(parse(CONFIG + "dynamic_batching { priority_levels: 2 }")) == []
