"""Text to tokens and back on the edge: whole, as a stream, up to a stop string, and from chat messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import tokenizers

from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Tokens

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer:
    """The tokenizer of a Hugging Face or draft folder."""

    def __init__(self, inner: tokenizers.Tokenizer, folder: Path) -> None:
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self.folder = folder
        self._config = _read_optional_json(folder / "tokenizer_config.json")
        self.special_token_ids = frozenset(i for i, t in inner.get_added_tokens_decoder().items() if t.special)
        self.eos_token_ids = self._find_eos()
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `folder`/tokenizer.json and what lies beside it.

        Raises:
            ModelError: a file is missing or damaged, or no file tells the end-of-sequence token.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} holds no tokenizer.json")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        return cls(inner, folder)

    def encode(self, text: str, add_special_tokens: bool = True) -> Tokens:
        """int32 token ids."""
        return np.array(self._inner.encode(text, add_special_tokens=add_special_tokens).ids, np.int32)

    def decode(self, ids: TokenIds, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; what is not valid UTF-8 becomes U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """`messages` (each with `role` and `content`) in the model's chat template, ready for the assistant's turn.

        Raises:
            ModelError: there is no template, or it refuses the messages.
        """
        from jinja2 import TemplateError  # only chats need it: keeps the start of the command short
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        special = {name: self._special(name) or "" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        template = self._chat_template()
        try:
            return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
        except (TemplateError, TypeError, KeyError) as error:
            raise ModelError(f"the chat template of {self.folder} refuses these messages: {error}") from None

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """Token ids of `chat_prompt(messages)`, whose template brings its special tokens itself."""
        return self.encode(self.chat_prompt(messages), add_special_tokens=False)

    def _chat_template(self) -> str:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
        if not isinstance(template, str):
            raise ModelError(f"{self.folder} has no chat template: give a plain prompt, or add chat_template.jinja")
        return template

    def _special(self, name: str) -> str | None:
        """A token named in tokenizer_config.json, written as a string or as an object."""
        value = self._config.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def _find_eos(self) -> tuple[int, ...]:
        """As transformers' `generate` does: generation_config.json before config.json before the tokenizer's own."""
        for name in ("generation_config.json", "config.json"):
            ids = _read_optional_json(self.folder / name).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (int(ids),)
        token = self._special("eos_token")
        token_id = self._inner.token_to_id(token) if token else None
        if token_id is None:
            raise ModelError(f"{self.folder} does not tell the end-of-sequence token; add generation_config.json")
        return (token_id,)


class TextStream:
    """Decodes a growing list of tokens; gives text once it is complete.

    A character whose bytes are spread over tokens is held back until its last byte is there. The pieces together are
    what `decode` gives for all tokens. `context`: tokens before the first one, where the decoder's treatment of a
    space depends on them (SentencePiece).
    """

    def __init__(self, tokenizer: Tokenizer, context: TokenIds = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = [int(i) for i in context]  # from the last piece given on; older ones are dropped
        self._given = self._decode()  # the part of their text that was given already

    def push(self, ids: TokenIds) -> str:
        """The new complete text after `ids`; empty if they end within a character."""
        start = len(self._ids)
        self._ids.extend(int(i) for i in ids)
        text = self._decode()
        if len(text) <= len(self._given) or text.endswith(_REPLACEMENT):
            return ""
        new = text[len(self._given) :]
        self._ids = self._ids[start:]
        self._given = self._decode()
        return new

    def flush(self) -> str:
        """What is still held back; a character that never became complete is U+FFFD."""
        new = self._decode()[len(self._given) :]
        self._given += new
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip)


class StopMatcher:
    """Passes text on up to the first stop string, which it swallows.

    The first stop string is the one that is complete first, so the result does not depend on how the text is cut
    into pieces. `stopped` is that string, else None.
    """

    def __init__(self, stop_strings: Iterable[str] = ()) -> None:
        self._stops = tuple(dict.fromkeys(stop_strings))
        if "" in self._stops:
            raise ValueError("a stop string must not be empty")
        self._held = ""
        self.stopped: str | None = None
        self.num_passed = 0  # characters given; once stopped, where the stop string began

    def push(self, text: str) -> str:
        """The part of the text that is certainly not in a stop string; nothing once stopped."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            _, at, self.stopped = min(matches)
            self._held = ""
            return self._pass(text[:at])
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return self._pass(text[: len(text) - num_held])

    def flush(self) -> str:
        """What was held back as the possible beginning of a stop string, at the end of the text."""
        held, self._held = self._held, ""
        return self._pass(held)

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _pass(self, text: str) -> str:
        self.num_passed += len(text)
        return text


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: a JSON object is needed")
    return value
