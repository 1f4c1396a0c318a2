"""Checked access to single values of a request: tensors unwrapped, parameters converted and bounded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wisp_plugin.config import DEFAULT_SLO_CLASS
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import Mode, Sampling, Slo, Tokens

Array = npt.NDArray[Any]
Parameter = int | float | bool | str

MAX_SEED = 2**63 - 1
_SESSION_FORM = re.compile(rb"[0-9a-f]{32}")
_INTEGER_FORM = re.compile(r"[+-]?[0-9]{1,20}")


# -- tensors ----------------------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """`value` in an error message: its first 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def vector(tensors: Mapping[str, Array], name: str, dtype: type[np.generic]) -> Array:
    """Tensor `name` as a contiguous one-dimensional array of `dtype`."""
    if name not in tensors:
        raise InvalidRequest(f"tensor {name!r} is missing")
    array = tensors[name]
    if array.dtype != dtype or array.ndim != 1:
        wanted = np.dtype(dtype).name
        raise InvalidRequest(f"tensor {name!r} is {array.dtype.name}{list(array.shape)}; must be {wanted}[n]")
    return np.ascontiguousarray(array)


def scalar(tensors: Mapping[str, Array], name: str, dtype: type[np.generic]) -> int:
    """The one element of tensor `name`."""
    array = vector(tensors, name, dtype)
    if len(array) != 1:
        raise InvalidRequest(f"tensor {name!r} has {len(array)} elements; must have 1")
    return int(array[0])


def session(tensors: Mapping[str, Array], *, may_be_empty: bool) -> str:
    """The session capability of tensor SESSION; empty only where the server may draw one."""
    array = tensors.get("SESSION")
    if array is None or array.dtype != np.object_ or array.shape != (1,):
        raise InvalidRequest("tensor 'SESSION' must be BYTES[1]")
    element = array[0].encode(errors="replace") if isinstance(array[0], str) else array[0]
    raw = element if isinstance(element, bytes) else b"?"
    if not raw and may_be_empty:
        return ""
    if not _SESSION_FORM.fullmatch(raw):
        raise InvalidRequest("tensor 'SESSION' must hold 32 lower-case hex digits")
    return raw.decode()


def is_anonymous(tensors: Mapping[str, Array]) -> bool:
    """True if tensor SESSION is there and empty: the server draws the capability and has to tell it."""
    array = tensors.get("SESSION")
    return array is not None and array.shape == (1,) and not array[0]


def token_ids(tensors: Mapping[str, Array], name: str, vocab_size: int) -> Tokens:
    """Token ids of tensor `name`, each inside the vocabulary."""
    tokens: Tokens = vector(tensors, name, np.int32)
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(outside):
        where = int(outside[0])
        raise InvalidRequest(f"tensor {name!r} has token id {tokens[where]} at {where}; allowed: 0 to {vocab_size - 1}")
    return tokens


# -- parameters -------------------------------------------------------------------------------------------------


def integer(parameters: Mapping[str, Parameter], name: str, default: int, low: int, high: int) -> int:
    """Whole-number parameter `name` between `low` and `high`."""
    value = parameters.get(name, default)
    is_whole = isinstance(value, int) or (isinstance(value, str) and _INTEGER_FORM.fullmatch(value) is not None)
    if isinstance(value, bool) or not is_whole or not low <= int(value) <= high:
        raise InvalidRequest(f"parameter {name!r} is {shown(value)}; allowed: a whole number from {low} to {high}")
    return int(value)


def number(parameters: Mapping[str, Parameter], name: str, default: float, low: float, high: float) -> float:
    """Numeric parameter `name` between `low` and `high`."""
    value = parameters.get(name, default)
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not low <= result <= high:
        raise InvalidRequest(f"parameter {name!r} is {shown(value)}; allowed: a number from {low:g} to {high:g}")
    return result


def boolean(parameters: Mapping[str, Parameter], name: str) -> bool:
    """Truth parameter `name`, false if absent."""
    value = parameters.get(name, False)
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text not in ("true", "false", "0", "1"):
        raise InvalidRequest(f"parameter {name!r} is {shown(value)}; allowed: true, false")
    return text in ("true", "1")


def id_list(parameters: Mapping[str, Parameter], name: str, vocab_size: int) -> tuple[int, ...]:
    """Comma-separated token ids of parameter `name`, at most 64."""
    parts = [part.strip() for part in str(parameters[name]).split(",") if part.strip()]
    if len(parts) > 64 or not all(_INTEGER_FORM.fullmatch(p) and 0 <= int(p) < vocab_size for p in parts):
        raise InvalidRequest(
            f"parameter {name!r} is {str(parameters[name])[:80]!r}; allowed: up to 64 comma-separated token ids "
            f"from 0 to {vocab_size - 1}"
        )
    return tuple(int(p) for p in parts)


def mode(parameters: Mapping[str, Parameter]) -> Mode:
    """Parameter `mode`."""
    value = parameters.get("mode", Mode.FREE.value)
    if value not in (Mode.FREE.value, Mode.SYNC.value):
        raise InvalidRequest(f"parameter 'mode' is {shown(value)}; allowed: 'free', 'sync'")
    return Mode(value)


def sampling(parameters: Mapping[str, Parameter], vocab_size: int) -> Sampling:
    """The parameters of token choice."""
    return Sampling(
        seed=integer(parameters, "seed", 0, 0, MAX_SEED),
        temperature=_temperature(parameters),
        top_k=integer(parameters, "top_k", 0, 0, vocab_size),
        top_p=number(parameters, "top_p", 1.0, 1e-9, 1.0),
        repetition_penalty=number(parameters, "repetition_penalty", 1.0, 0.01, 100.0),
    )


def _temperature(parameters: Mapping[str, Parameter]) -> float:
    value = number(parameters, "temperature", 0.0, 0.0, 100.0)
    if 0.0 < value < 1e-3:
        raise InvalidRequest(
            f"parameter 'temperature' is {shown(value)}; allowed: 0 (greedy) or a number from 0.001 to 100"
        )
    return value


def check_vocab_hash(parameters: Mapping[str, Parameter], server_hash: str) -> None:
    """Refuse a client whose tokenizer is not the server's; a client that sends no hash is trusted."""
    client_hash = str(parameters.get("vocab_hash", ""))
    if client_hash and server_hash and client_hash != server_hash:
        raise InvalidRequest(
            f"the client's tokenizer differs: its vocab_hash is {' '.join(client_hash[:64].split())}, "
            f"the server's {server_hash}"
        )


# -- SLO --------------------------------------------------------------------------------------------------------


def named_slo(name: str = DEFAULT_SLO_CLASS) -> Slo:
    """The SLO of a client that asks for the server's class `name`, or for the server's default.

    Its numbers are the server's: here they are infinite, which stands for "not known to the client".
    """
    return Slo(math.inf, math.inf, name)


def slo(parameters: Mapping[str, Parameter], default: Slo, classes: Mapping[str, Slo]) -> Slo:
    """The SLO of an `open`: a class by name, or numbers (a missing one is the default's), or the default."""
    numbers = [name for name in ("ttft_ms", "tpot_ms") if name in parameters]
    if "slo" in parameters:
        if numbers:
            raise InvalidRequest(f"parameters 'slo' and {numbers[0]!r} exclude each other; allowed: a class or numbers")
        return _slo_class(str(parameters["slo"]), classes)
    if not numbers:
        return default
    return Slo(
        ttft_ms=number(parameters, "ttft_ms", default.ttft_ms, 0.001, 1e7),
        tpot_ms=number(parameters, "tpot_ms", default.tpot_ms, 0.001, 1e7),
    )


def _slo_class(name: str, classes: Mapping[str, Slo]) -> Slo:
    if not classes:
        raise InvalidRequest(f"parameter 'slo' is {shown(name)}; this server has no SLO classes, only numbers")
    if name not in classes:
        raise InvalidRequest(f"parameter 'slo' is {shown(name)}; allowed: {', '.join(classes)}")
    return classes[name]


def slo_parameters(slo: Slo) -> dict[str, Parameter]:
    """The parameters of an `open` for `slo`: the client's side of `slo`. What is the server's is not sent."""
    if slo.name == DEFAULT_SLO_CLASS:
        return {}
    if slo.name:
        return {"slo": slo.name}
    numbers = {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms}
    return {name: repr(value) for name, value in numbers.items() if value != math.inf}
