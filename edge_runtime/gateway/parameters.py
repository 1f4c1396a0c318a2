"""Fields of a request body, each checked once: its type, its range, and that nothing is there that is not understood.

Every refusal is a `Refusal` 422 of one line that names the field. Null counts as absent, as in TGI and OpenAI.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.gateway.errors import Refusal, invalid
from wisp_plugin.messages import Sampling, Tokens
from wisp_plugin.wire_values import MAX_SEED, shown

MAX_STOP_STRINGS = 4  # as TGI's and OpenAI's
MAX_STOP_CHARACTERS = 256
DRAWN_SEEDS = 2**53  # a seed that is drawn survives JSON numbers in every language
_TEMPERATURES = (1e-3, 100.0)  # of a sampling session, as in `wire_values.sampling`


@dataclass(frozen=True, slots=True)
class Limits:
    """What this gateway accepts."""

    vocab_size: int
    max_total_tokens: int  # prompt and generated tokens of one session


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request for one session."""

    prompt: Tokens
    prompt_text: str
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    drafts: bool = True


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Refusal 400 if it is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: also what is no UTF-8, and numbers of 5000 digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, "bad_request", f"the body is no JSON: {reason}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "bad_request", f"the body is {shown(value)}; it must be a JSON object")
    return value


class Fields:
    """Typed access to the fields of one JSON object. `done` refuses every field that nobody has asked for."""

    def __init__(self, values: Mapping[str, Any], inside: str = "") -> None:
        """`inside`: what the fields are part of, for messages (`parameters.`)."""
        self._values, self._inside = values, inside
        self._known: set[str] = set()

    def get(self, name: str) -> Any:
        """The value as it is; None if absent."""
        self._known.add(name)
        return self._values.get(name)

    def refuse(self, name: str, allowed: str) -> Refusal:
        """The error for field `name`, which has a value that is not `allowed`."""
        return invalid(f"`{self._inside}{name}` is {shown(self._values.get(name))}; allowed: {allowed}", name)

    def text(self, name: str, required: bool = False) -> str | None:
        """A text that UTF-8 can hold; None if absent and not `required`."""
        value = self.get(name)
        if value is None and not required:
            return None
        if not isinstance(value, str):
            raise self.refuse(name, "a text")
        check_text(value, name, self._inside)
        return value

    def flag(self, name: str) -> bool | None:
        """True, False or None."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "true, false")
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`, or None."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, above_low: bool = False) -> float | None:
        """A number from `low` (or, with `above_low`, above it) to `high`, or None."""
        value = self.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (above_low and value == low):  # NaN is refused, too
            begin = f"above {low:g} and up" if above_low else f"from {low:g}"
            raise self.refuse(name, f"a number {begin} to {high:g}")
        return float(value)

    def stop_strings(self, name: str, may_be_one: bool = False) -> tuple[str, ...]:
        """Up to `MAX_STOP_STRINGS` texts; with `may_be_one` also a text alone."""
        value = self.get(name)
        if may_be_one and isinstance(value, str):
            value = [value]
        value = [] if value is None else value
        allowed = f"a list of up to {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_CHARACTERS} characters"
        if not isinstance(value, list) or len(value) > MAX_STOP_STRINGS:
            raise self.refuse(name, allowed)
        for text in value:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise self.refuse(name, allowed)
            check_text(text, name, self._inside)
        return tuple(value)

    def unsupported(self, neutral: Mapping[str, Sequence[Any]]) -> None:
        """Refuse every field of `neutral` that has another value than null or one that asks for nothing."""
        for name, values in neutral.items():
            value = self.get(name)
            if value is not None and not any(type(value) is type(v) and value == v for v in values):
                allowed = ", ".join(["no value", *map(repr, values)])
                raise invalid(f"`{self._inside}{name}` is not supported; allowed: {allowed}", name)

    def done(self) -> None:
        """Refuse what is left."""
        unknown = sorted(name for name in self._values if name not in self._known)
        if unknown:
            allowed = ", ".join(sorted(self._known))
            raise invalid(f"unknown field `{self._inside}{unknown[0][:80]}`; known: {allowed}", unknown[0][:80])


def check_text(text: str, name: str, inside: str = "") -> None:
    """Refuse half surrogate pairs: JSON can write them, UTF-8 and tokenizers can not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        where = f"{inside}{name}"
        raise invalid(f"`{where}` holds half of a surrogate pair; allowed: text that UTF-8 can hold", name) from None


def sampling(
    fields: Fields, is_sampled: bool, temperature: float, seed: int | None, top_p: float | None, top_k: int | None
) -> Sampling:
    """How tokens are chosen; without a seed one is drawn. Greedy sessions need none of it but the penalty."""
    penalty = fields.number("repetition_penalty", 0.01, 100.0)
    penalty = 1.0 if penalty is None else penalty
    if not is_sampled:
        return Sampling(repetition_penalty=penalty, seed=seed or 0)
    low, high = _TEMPERATURES
    if not low <= temperature <= high:
        raise fields.refuse("temperature", f"a number from {low:g} to {high:g}, or no sampling")
    return Sampling(
        seed=secrets.randbelow(DRAWN_SEEDS) if seed is None else seed,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        repetition_penalty=penalty,
    )


def seed_of(fields: Fields) -> int | None:
    """The seed, if one is given."""
    return fields.whole("seed", 0, MAX_SEED)


def room(prompt: Tokens, limits: Limits, inputs: str = "inputs") -> int:
    """Tokens that may follow `prompt`, which is field `inputs`. Refusal 422 if there are none, or no prompt."""
    if not len(prompt):
        raise invalid(f"`{inputs}` cannot be empty", inputs)
    left = limits.max_total_tokens - len(prompt)
    if left < 1:
        raise invalid(f"`{inputs}` must have less than {limits.max_total_tokens} tokens. Given: {len(prompt)}", inputs)
    return left


def check_room(num_new: int, prompt: Tokens, limits: Limits, name: str, inputs: str = "inputs") -> int:
    """`num_new` if so many tokens may follow `prompt`."""
    if num_new > room(prompt, limits, inputs):
        raise invalid(
            f"`{inputs}` tokens + `{name}` must be <= {limits.max_total_tokens}. "
            f"Given: {len(prompt)} `{inputs}` tokens and {num_new} `{name}`",
            name,
        )
    return num_new

