"""The target's tokenizer on the server, without torch and transformers: they would take ten times its memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from wisp_plugin.chat_template import ENVIRONMENT, ChatTemplate, Render
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Tokens


class TextTokenizer:
    """Text to token ids and back, as transformers does it with the same folder. Any thread may use it."""

    def __init__(self, folder: Path) -> None:
        """Read `folder`/tokenizer.json. ModelError if it is missing or damaged."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} holds no tokenizer.json")
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        self._inner.no_padding()
        self._inner.no_truncation()
        self.folder = folder
        self.vocab_size = self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> Tokens:
        """int32 token ids."""
        return np.array(self._inner.encode(text, add_special_tokens=add_special_tokens).ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; what is not valid UTF-8 becomes U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def encode_chat(self, text: str) -> Tokens:
        """Token ids of the user's message `text` in the model's chat template, ready for the assistant's turn.

        Raises:
            ModelError: there is no template, it refuses the message, or jinja2, which renders it, is missing.
        """
        return self.encode(self._render([{"role": "user", "content": text}]), add_special_tokens=False)

    @functools.cached_property
    def _render(self) -> Render:
        try:
            from jinja2 import TemplateError  # only chats need it
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ModelError("'chat' needs jinja2 on the server: pip install jinja2") from None

        return ChatTemplate.read(self.folder).compiled(ImmutableSandboxedEnvironment(**ENVIRONMENT), TemplateError)
