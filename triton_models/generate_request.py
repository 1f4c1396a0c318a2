"""What a client of `wisp_generate` asks for, checked once.

The same thing may come as a tensor, as a request parameter (all that Triton's generate endpoint finds in its JSON and
that is no tensor) or inside the JSON text `sampling_parameters`, and under the names that other backends use. Twice is
an error, and so is a name that is not known: nothing that a client asks for is ignored.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from triton_models.lookup_reply import CHOICES
from wisp_plugin.config import check_slo_class
from wisp_plugin.errors import ConfigError, InvalidRequest
from wisp_plugin.messages import Sampling, Slo
from wisp_plugin.wire_values import Array, Parameter, boolean, integer, named_slo, number, sampling, shown

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
DRAWN_SEEDS = 2**53  # a seed that is drawn survives JSON numbers in every language
_MAX_TOKENS = 2**31 - 1  # the verifier knows the window and says so
_ALIASES = {"max_new_tokens": "max_tokens", "random_seed": "seed", "stop_words": "stop"}
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
_IN_JSON = (*_SAMPLING, "max_tokens", "stop", "ignore_eos")  # of sampling_parameters
_NAMES = (
    *_IN_JSON, "text_input", "stream", "sampling_parameters", "exclude_input_in_output", "return_full_text", "chat",
    "slo", "ttft_ms", "tpot_ms", "lookup",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for requests that do not say, and limits."""

    vocab_size: int
    max_text_bytes: int = 1 << 20
    lookup: str = "auto"


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One checked request. `max_tokens` None: as the verifier has it. `full_text`: the prompt is part of the text."""

    text: str
    stream: bool
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    slo: Slo
    full_text: bool
    chat: bool
    lookup: str


def decode_generate(
    parameters: Mapping[str, Parameter], tensors: Mapping[str, Array], defaults: Defaults
) -> GenerateRequest:
    """One request from outside.

    Raises:
        InvalidRequest: anything about it that is not allowed.
    """
    given = _collect(parameters, tensors)
    stream, chat = boolean(given, "stream"), boolean(given, "chat")
    max_tokens = integer(given, "max_tokens", 1, 1, _MAX_TOKENS) if "max_tokens" in given else None
    return GenerateRequest(
        text=_text(given, defaults.max_text_bytes),
        stream=stream,
        sampling=_sampling(given, defaults.vocab_size),
        max_tokens=max_tokens,
        stop=_stops(given),
        ignore_eos=boolean(given, "ignore_eos"),
        slo=_slo(given),
        full_text=_full_text(given, stream, chat),
        chat=chat,
        lookup=_choice(given, "lookup", defaults.lookup),
    )


def _collect(parameters: Mapping[str, Parameter], tensors: Mapping[str, Array]) -> dict[str, Any]:
    """All that was given, by its name here."""
    given: dict[str, Any] = {}
    for name, array in tensors.items():
        _add(given, name, _elements(name, array), _NAMES)
    for name, value in parameters.items():
        if not name.startswith("triton_"):  # Triton's own
            _add(given, name, value, _NAMES)
    if "sampling_parameters" in given:
        for name, value in _json_object(given.pop("sampling_parameters")).items():
            _add(given, name, value, _IN_JSON)
    return given


def _add(given: dict[str, Any], name: str, value: Any, allowed: tuple[str, ...]) -> None:
    known = _ALIASES.get(name, name)
    if known not in allowed:
        names = ", ".join(sorted({*allowed, *(a for a, b in _ALIASES.items() if b in allowed)} - {"text_input"}))
        raise InvalidRequest(f"unknown parameter {shown(name)}; allowed: {names}")
    if known in given:
        raise InvalidRequest(f"parameter {known!r} is given twice; allowed: once, under one name, in one place")
    given[known] = value


def _elements(name: str, array: Array) -> Any:
    """The element of a tensor of one, as Python has it; of `stop` a list."""
    if array.dtype.kind == "f":  # an FP32 stands for the shortest decimal that rounds to it: 0.8, not 0.800000011920929
        values: list[Any] = [float(str(x)) for x in array.ravel()]
    elif array.dtype.kind in "biu":
        values = array.ravel().tolist()
    else:
        values = [_decoded(name, x) for x in array.ravel()]
    if _ALIASES.get(name, name) == "stop":
        return values
    if len(values) != 1:
        raise InvalidRequest(f"tensor {name!r} has {len(values)} elements; must have 1")
    return values[0]


def _decoded(name: str, raw: object) -> str:
    try:
        return raw.decode() if isinstance(raw, bytes) else str(raw)
    except UnicodeDecodeError:
        raise InvalidRequest(f"tensor {name!r} is not UTF-8 text") from None


def _json_object(text: object) -> dict[str, Any]:
    try:
        value = json.loads(str(text))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest(f"parameter 'sampling_parameters' is {shown(text)}; allowed: a JSON object as text")
    return value


def _text(given: Mapping[str, Any], max_bytes: int) -> str:
    text = given.get("text_input")
    if not isinstance(text, str):
        raise InvalidRequest("tensor 'text_input' is missing; it must hold one text")
    num_bytes = len(text.encode(errors="surrogatepass"))
    if num_bytes > max_bytes:
        raise InvalidRequest(f"tensor 'text_input' has {num_bytes} bytes; allowed: {max_bytes}")
    return text


def _sampling(given: Mapping[str, Any], vocab_size: int) -> Sampling:
    values = {name: given[name] for name in _SAMPLING if name in given}
    if values.get("top_k") in (-1, "-1"):  # how vLLM says "off"
        values["top_k"] = 0
    values.setdefault("seed", secrets.randbelow(DRAWN_SEEDS))
    return sampling(values, vocab_size)


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    stops = given.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_list or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops):
        raise InvalidRequest(
            f"parameter 'stop' is {shown(stops)}; allowed: up to {MAX_STOPS} texts, each of 1 to {MAX_STOP_CHARACTERS} "
            "characters"
        )
    return tuple(stops)


def _slo(given: Mapping[str, Any]) -> Slo:
    """A class by name or numbers; what is not given is the server's."""
    numbers = {name: number(given, name, 0.0, 0.001, 1e7) for name in ("ttft_ms", "tpot_ms") if name in given}
    if "slo" not in given:
        return Slo(numbers.get("ttft_ms", np.inf), numbers.get("tpot_ms", np.inf)) if numbers else named_slo()
    if numbers:
        raise InvalidRequest(f"parameters 'slo' and {min(numbers)!r} exclude each other; allowed: a class or numbers")
    try:
        check_slo_class(str(given["slo"]))
    except ConfigError as error:
        raise InvalidRequest(f"parameter 'slo': {error}") from None
    return named_slo(str(given["slo"]))


def _full_text(given: Mapping[str, Any], stream: bool, chat: bool) -> bool:
    if "exclude_input_in_output" in given and "return_full_text" in given:
        raise InvalidRequest("'exclude_input_in_output' and 'return_full_text' are opposites; allowed: one of them")
    if "return_full_text" in given:
        full = boolean(given, "return_full_text")
    elif "exclude_input_in_output" in given:
        full = not boolean(given, "exclude_input_in_output")
    else:
        return not stream and not chat
    if full and (stream or chat):
        raise InvalidRequest("the prompt cannot be a part of the text of a stream or a chat; leave it out")
    return full


def _choice(given: Mapping[str, Any], name: str, default: str) -> str:
    value = given.get(name, default)
    if value not in CHOICES:
        raise InvalidRequest(f"parameter {name!r} is {shown(value)}; allowed: {', '.join(map(repr, CHOICES))}")
    return str(value)
