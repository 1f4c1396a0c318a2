"""The lines that a model's `config.pbtxt` needs for the batching strategy: read, compose, check.

The file stays the user's: nothing of it is written anew. WISP's lines stand together between two marks at its end, and
a later installation replaces what is between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from wisp_plugin.errors import ConfigError

BEGIN = "# -- WISP batching strategy: lines of `wisp-server install-plugin`, replaced by it --"
END = "# -- end of WISP's lines --"
_BLOCK = re.compile(rf"(?:\r?\n)?{re.escape(BEGIN)}.*?{re.escape(END)}(?:\r?\n)?", re.DOTALL)
_VALUE = "value:"  # of WISP_CONTEXT_INPUT: the input's one integer, not its length
_INTEGERS = ("TYPE_INT32", "TYPE_INT64")
_OTHER_SCHEDULERS = ("sequence_batching", "ensemble_scheduling")  # a model has one of these or dynamic_batching


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """Parameters WISP_* of a model; times in the units of their names, None: not given."""

    profile: str | None = None  # path as it stands in config.pbtxt: relative to the model's directory, or absolute
    base_us: float | None = None
    per_token_us: float | None = None
    per_context_us: float | None = None
    tokens_input: str | None = None  # NAME or FIRST,SECOND
    context_input: str | None = None  # NAME or value:NAME
    slo_ms: float | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        """ConfigError unless there are costs of exactly one kind and every number is in range."""
        inline = {"base-us": self.base_us, "per-token-us": self.per_token_us, "per-context-us": self.per_context_us}
        for name, value in (inline | {"slo-ms": self.slo_ms, "margin": self.margin}).items():
            least_open = name in ("slo-ms", "margin")
            if value is not None and not (0.0 <= value < math.inf and (value > 0.0 or not least_open)):
                raise ConfigError(f"--{name} is {value}; allowed: a number {'above' if least_open else 'from'} 0")
        has_inline = any(value is not None for value in inline.values())
        if has_inline == (self.profile is not None):
            raise ConfigError("what does a batch cost? give --profile FILE, or --base-us and --per-token-us, not both")
        if has_inline and not any(inline.values()):
            raise ConfigError("--base-us, --per-token-us and --per-context-us are all 0; allowed: one above 0")

    def parameters(self) -> dict[str, str]:
        """By their names in config.pbtxt."""
        named = {
            "WISP_PROFILE": self.profile, "WISP_BASE_US": self.base_us, "WISP_PER_TOKEN_US": self.per_token_us,
            "WISP_PER_CONTEXT_US": self.per_context_us, "WISP_TOKENS_INPUT": self.tokens_input,
            "WISP_CONTEXT_INPUT": self.context_input, "WISP_SLO_MS": self.slo_ms, "WISP_MARGIN": self.margin,
        }  # fmt: skip
        return {
            name: value if isinstance(value, str) else _exact(value)
            for name, value in named.items()
            if value is not None
        }


def with_plugin(text: str, settings: PluginSettings) -> tuple[str, str]:
    """The whole of a config.pbtxt with WISP's lines in it, ended as its own lines are, and these lines alone with LF.

    Raises:
        ConfigError: the file is no model configuration, or one that the strategy cannot work with.
    """
    line_end = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"
    bare = _BLOCK.sub(line_end, text)
    config = parse(bare)
    check(config)
    lines = [BEGIN]
    if not config.HasField("dynamic_batching"):
        lines.append("dynamic_batching { }")
    for name, value in settings.parameters().items():
        lines.append(f'parameters {{ key: "{name}" value: {{ string_value: {_quoted(value)} }} }}')
    lines.append(END)
    whole = bare.rstrip() + 2 * line_end + "".join(line + line_end for line in lines)
    parse_inputs(parse(whole), settings.tokens_input, settings.context_input)
    return whole, "".join(f"{line}\n" for line in lines)


def parse(text: str) -> Any:
    """The ModelConfig in a config.pbtxt.

    Raises:
        ConfigError: it is none; with line and column.
    """
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise ConfigError(f"config.pbtxt cannot be read: {' '.join(str(error).split())}") from None
    return config


def check(config: Any) -> None:
    """Refuse a user's own configuration that the strategy cannot work with; it is without WISP's lines.

    Raises ConfigError.
    """
    outside = sorted(name for name in config.parameters if name.startswith("WISP_"))
    if outside:
        raise ConfigError(f"config.pbtxt has {outside[0]} outside of WISP's lines; remove it first")
    for other in _OTHER_SCHEDULERS:
        if config.HasField(other):
            raise ConfigError(f"config.pbtxt has {other}; a batching strategy works with dynamic batching only")
    if config.max_batch_size < 1:
        raise ConfigError("max_batch_size is 0; allowed: 1 or more, there is nothing to batch otherwise")


@dataclass(frozen=True, slots=True)
class SizedInputs:
    """Inputs that tell a request's size: up to two with new tokens, and one with the context."""

    tokens: tuple[str, ...] = ()
    context: str | None = None
    context_is_value: bool = False


def parse_inputs(config: Any, tokens_input: str | None, context_input: str | None) -> SizedInputs:
    """WISP_TOKENS_INPUT and WISP_CONTEXT_INPUT, checked against the inputs of a ModelConfig. Raises ConfigError."""
    types = {one.name: model_config_pb2.DataType.Name(one.data_type) for one in config.input}
    tokens = tuple(tokens_input.split(",")) if tokens_input else ()
    if len(tokens) > 2 or len(set(tokens)) < len(tokens):
        raise ConfigError(f"WISP_TOKENS_INPUT is {tokens_input!r}; allowed: NAME or FIRST,SECOND")
    is_value = bool(context_input) and str(context_input).startswith(_VALUE)
    context = str(context_input).removeprefix(_VALUE) if context_input else None
    for parameter, name in (*(("WISP_TOKENS_INPUT", name) for name in tokens), ("WISP_CONTEXT_INPUT", context)):
        if name is not None:
            _check_input(parameter, name, types)
    if context is not None and is_value and types[context] not in _INTEGERS:
        raise ConfigError(
            f"WISP_CONTEXT_INPUT wants the value of {context!r}, which is {types[context]}; allowed: "
            f"{', '.join(_INTEGERS)}"
        )
    return SizedInputs(tokens, context, is_value)


def _check_input(parameter: str, name: str, types: Mapping[str, str]) -> None:
    if not types:
        raise ConfigError(
            f"{parameter} names {name!r}, but the model's configuration names no inputs; add its inputs to "
            "config.pbtxt, also where Triton would complete them itself"
        )
    if name not in types:
        raise ConfigError(f"{parameter} names {name!r}, no input of the model; allowed: {', '.join(types)}")


def advice(config: Any) -> list[str]:
    """What works, but not as well as it could: a line each."""
    lines = []
    if config.dynamic_batching.priority_levels < 2:
        lines.append(
            "dynamic_batching has one queue, in which a strategy can do little; with priority_levels: 2, and urgent "
            "requests that use them, it does most"
        )
    ragged = [one.name for one in config.input if -1 in one.dims and not one.allow_ragged_batch]
    if ragged:
        lines.append(
            f"requests whose {', '.join(ragged)} differ in shape are not batched; if the model can take them together, "
            "add allow_ragged_batch: true to the input"
        )
    return lines


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _exact(value: float) -> str:
    """All digits: read again it is the same number. 100 and not 100.0."""
    return repr(float(value)).removesuffix(".0")
