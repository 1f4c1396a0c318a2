"""The chat template of a model folder, rendered as transformers does it.

The template engine (jinja2) is passed in: this package needs none, and only chats do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from wisp_plugin.errors import ModelError

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
Render = Callable[[Sequence[Mapping[str, str]]], str]
ENVIRONMENT = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}  # of jinja2


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Template text of `folder`, and the special tokens that it may name."""

    folder: Path
    text: str
    special_tokens: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate:
        """`folder`/chat_template.jinja, else what tokenizer_config.json says. ModelError if there is neither."""
        config = read_optional_json(folder / "tokenizer_config.json")
        special = {name: special_token(config, name) or "" for name in _SPECIAL}
        return cls(folder, _template_text(folder, config), special)

    def compiled(self, environment: Any, template_error: type[Exception]) -> Render:
        """What renders messages (each with `role` and `content`), ready for the assistant's turn; keep it: to compile
        takes longer than all else about a prompt. Any thread may use it; ModelError if the template refuses messages.

        `environment` is a sandboxed one of jinja2, made with `ENVIRONMENT`, and `template_error` jinja2's.

        Raises:
            ModelError: the template is damaged.
        """

        def refuse(message: str) -> NoReturn:
            raise template_error(message)

        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            template = environment.from_string(self.text)
        except template_error as error:
            raise ModelError(f"the chat template of {self.folder} is damaged: {error}") from None

        def render(messages: Sequence[Mapping[str, str]]) -> str:
            try:
                return str(template.render(messages=messages, add_generation_prompt=True, **self.special_tokens))
            except (template_error, TypeError, KeyError) as error:
                raise ModelError(f"the chat template of {self.folder} refuses these messages: {error}") from None

        return render


def special_token(config: Mapping[str, Any], name: str) -> str | None:
    """A token named in tokenizer_config.json, written as a string or as an object."""
    value = config.get(name)
    return value.get("content") if isinstance(value, dict) else value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty if there is no such file. ModelError if it is something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: a JSON object is needed")
    return value


def _template_text(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str):
        raise ModelError(f"{folder} has no chat template: give a plain prompt, or add chat_template.jinja")
    return template
