"""The lines that a model's `config.pbtxt` needs for the batching strategy: read, compose, check.

The file stays the user's: nothing of it is written anew. WISP's lines stand together between two marks at its end, and
a later installation replaces what is between them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from wisp_plugin.errors import ConfigError

BEGIN = "# -- WISP batching strategy: lines of `wisp-server install-plugin`, replaced by it --"
END = "# -- end of WISP's lines --"
_BLOCK = re.compile(rf"\n?{re.escape(BEGIN)}.*?{re.escape(END)}\n?", re.DOTALL)
_VALUE = "value:"  # of WISP_CONTEXT_INPUT: the input's one integer, not its length
_INTEGERS = ("TYPE_INT32", "TYPE_INT64")


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
            name: f"{value:g}" if isinstance(value, float) else value
            for name, value in named.items()
            if value is not None
        }


def with_plugin(text: str, settings: PluginSettings) -> tuple[str, str]:
    """The whole of a config.pbtxt with WISP's lines in it, and these lines alone.

    Raises:
        ConfigError: the file is no model configuration, or one that the strategy cannot work with.
    """
    bare = _BLOCK.sub("\n", text) if BEGIN in text else text
    config = parse(bare)
    lines = [BEGIN]
    if not config.HasField("dynamic_batching"):
        lines.append("dynamic_batching { }")
    for name, value in settings.parameters().items():
        lines.append(f'parameters {{ key: "{name}" value: {{ string_value: {_quoted(value)} }} }}')
    lines.append(END)
    block = "\n".join(lines) + "\n"
    whole = f"{bare.rstrip()}\n\n{block}"
    check(parse(whole), of_user=config)
    return whole, block


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


def check(config: Any, of_user: Any) -> None:
    """Refuse a configuration with the strategy's parameters in it that Triton or the strategy would refuse.

    `of_user`: the same without WISP's lines. Raises ConfigError.
    """
    outside = sorted(name for name in of_user.parameters if name.startswith("WISP_"))
    if outside:
        raise ConfigError(f"config.pbtxt has {outside[0]} outside of WISP's lines; remove it first")
    if config.HasField("sequence_batching"):
        raise ConfigError("config.pbtxt has sequence_batching; a batching strategy works with dynamic batching only")
    if config.max_batch_size < 1:
        raise ConfigError("max_batch_size is 0; allowed: 1 or more, there is nothing to batch otherwise")
    given = {name: config.parameters[name].string_value for name in config.parameters}
    parse_inputs(config, given.get("WISP_TOKENS_INPUT"), given.get("WISP_CONTEXT_INPUT"))


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
        if name is not None and name not in types:
            raise ConfigError(f"{parameter} names {name!r}, no input of the model; allowed: {', '.join(types)}")
    if context is not None and is_value and types[context] not in _INTEGERS:
        raise ConfigError(
            f"WISP_CONTEXT_INPUT wants the value of {context!r}, which is {types[context]}; allowed: "
            f"{', '.join(_INTEGERS)}"
        )
    return SizedInputs(tokens, context, is_value)


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
