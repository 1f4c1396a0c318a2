"""Text to tokens and back on the edge: whole, as a stream, up to a stop string, and from chat messages."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from wisp_plugin.chat_template import ENVIRONMENT, ChatTemplate, Render, read_optional_json, special_token
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Tokens
from wisp_plugin.text_stream import Detokenizer, TokenIds


class Tokenizer:
    """The tokenizer of a Hugging Face or draft folder."""

    def __init__(self, inner: tokenizers.Tokenizer, folder: Path) -> None:
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self.folder = folder
        self._config = read_optional_json(folder / "tokenizer_config.json")
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

    def pieces(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int, int]]:
        """Token ids of `text`, each with the characters that it stands for: (id, start, end)."""
        encoding = self._inner.encode(text, add_special_tokens=add_special_tokens)
        return [(token, *span) for token, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: TokenIds, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; what is not valid UTF-8 becomes U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def detokenizer(self, context: TokenIds = ()) -> Detokenizer:
        """For a text that comes token by token behind `context`."""
        return Detokenizer(self.decode, context)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """`messages` (each with `role` and `content`) in the model's chat template, ready for the assistant's turn.

        Raises:
            ModelError: there is no template, or it refuses the messages.
        """
        return self._render(messages)

    @functools.cached_property
    def _render(self) -> Render:
        from jinja2 import TemplateError  # only chats need it: keeps the start of the command short
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        return ChatTemplate.read(self.folder).compiled(ImmutableSandboxedEnvironment(**ENVIRONMENT), TemplateError)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """Token ids of `chat_prompt(messages)`, whose template brings its special tokens itself."""
        return self.encode(self.chat_prompt(messages), add_special_tokens=False)

    def _find_eos(self) -> tuple[int, ...]:
        """As transformers' `generate` does: generation_config.json before config.json before the tokenizer's own."""
        for name in ("generation_config.json", "config.json"):
            ids = read_optional_json(self.folder / name).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (int(ids),)
        token = special_token(self._config, "eos_token")
        token_id = self._inner.token_to_id(token) if token else None
        if token_id is None:
            raise ModelError(f"{self.folder} does not tell the end-of-sequence token; add generation_config.json")
        return (token_id,)
