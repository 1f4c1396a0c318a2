"""The shapes of OpenAI's API: completions and chat completions, whole and as a stream.

Fields that would ask for something else than is offered are refused by name. `model` and `user` are taken and say
nothing: there is one model, and users are not told apart.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_runtime.gateway.errors import invalid
from edge_runtime.gateway.generation import EOS, STOP, Generation, Token
from edge_runtime.gateway.parameters import (
    Fields,
    GenerationRequest,
    Limits,
    check_room,
    check_text,
    room,
    sampling,
    seed_of,
)
from edge_runtime.tokenizer import Tokenizer
from wisp_plugin import __version__
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Sampling, Tokens

DEFAULT_NEW_TOKENS = 1024  # of a request without max_tokens, as in TGI
MAX_MESSAGES = 1024
_ROLES = ("system", "user", "assistant")
_NEUTRAL: dict[str, Sequence[Any]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": (), "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"),
    "tool_prompt": (), "functions": (), "function_call": (), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "top_logprobs": (0,), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "reasoning_effort": (), "store": (False,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpenAiRequest:
    """A checked body of one of the two routes."""

    generation: GenerationRequest
    is_chat: bool
    stream: bool
    logprobs: bool
    include_usage: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


def parse(body: Mapping[str, Any], tokenizer: Tokenizer, limits: Limits, is_chat: bool) -> OpenAiRequest:
    """The request that `body` is. Raises Refusal."""
    fields = Fields(body)
    for name in ("model", "user"):
        fields.text(name)
    stream = bool(fields.flag("stream"))
    include_usage = _include_usage(fields, stream)
    fields.unsupported(_NEUTRAL)
    chosen = _sampling(fields, limits)
    stop = fields.stop_strings("stop", may_be_one=True)
    logprobs = bool(fields.flag("logprobs")) if is_chat else fields.whole("logprobs", 0, 0) is not None
    prompt, text = chat_prompt(fields.get("messages"), tokenizer) if is_chat else _prompt(fields, tokenizer, limits)
    names = ("max_completion_tokens", "max_tokens") if is_chat else ("max_tokens",)
    given = {name: fields.whole(name, 1, 2**32 - 1) for name in names}
    fields.done()
    inputs = "messages" if is_chat else "prompt"
    left = room(prompt, limits, inputs)
    wanted = next(((value, name) for name, value in given.items() if value is not None), None)
    num_new = check_room(wanted[0], prompt, limits, wanted[1], inputs) if wanted else min(DEFAULT_NEW_TOKENS, left)
    generation = GenerationRequest(prompt, text, num_new, chosen, stop, logprobs)
    return OpenAiRequest(generation, is_chat, stream, logprobs, include_usage)


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        raise fields.refuse("stream_options", "an object, with `stream` true")
    inner = Fields(options, "stream_options.")
    include_usage = bool(inner.flag("include_usage"))
    inner.unsupported({"include_obfuscation": (False,)})
    inner.done()
    return include_usage


def _sampling(fields: Fields, limits: Limits) -> Sampling:
    """Temperature 1 unless one is given; 0 is greedy. `top_k` and `repetition_penalty` are extensions, as in vLLM."""
    temperature = fields.number("temperature", 0.0, 100.0)
    top_p, top_k = fields.number("top_p", 1e-9, 1.0), fields.whole("top_k", 1, limits.vocab_size)
    temperature = 1.0 if temperature is None else temperature
    return sampling(fields, temperature > 0.0, temperature, seed_of(fields), top_p, top_k)


def _prompt(fields: Fields, tokenizer: Tokenizer, limits: Limits) -> tuple[Tokens, str]:
    """A text, a list of one text, or token ids."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        check_text(prompt, "prompt")
        return tokenizer.encode(prompt), prompt
    is_ids = isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt)
    if not is_ids or not all(0 <= t < limits.vocab_size for t in prompt):
        raise fields.refuse("prompt", f"one text, or token ids from 0 to {limits.vocab_size - 1}")
    return np.array(prompt, np.int32), ""


def chat_prompt(messages: Any, tokenizer: Tokenizer) -> tuple[Tokens, str]:
    """Token ids and text of a conversation in the model's chat template. Raises Refusal."""
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise invalid(f"`messages` must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    checked = [_message(message, index) for index, message in enumerate(messages)]
    try:
        text = tokenizer.chat_prompt(checked)
    except ModelError as error:
        raise invalid(str(error), "messages") from None
    return tokenizer.encode(text, add_special_tokens=False), text


def _message(message: Any, index: int) -> dict[str, str]:
    if not isinstance(message, dict):
        raise invalid(f"`messages[{index}]` must be an object with `role` and `content`", "messages")
    fields = Fields(message, f"messages[{index}].")
    role = fields.text("role", required=True)
    role = "system" if role == "developer" else role
    if role not in _ROLES:
        raise fields.refuse("role", ", ".join(_ROLES))
    fields.text("name")
    fields.unsupported({"tool_calls": ([],), "tool_call_id": (), "function_call": (), "refusal": (), "audio": ()})
    content = _content(fields)
    fields.done()
    return {"role": role, "content": content}


def _content(fields: Fields) -> str:
    """A text, or parts that are texts."""
    content = fields.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise fields.refuse("content", 'a text, or a list of {"type": "text", "text": ...}')
        check_text(part["text"], "content", "messages.")
        texts.append(part["text"])
    return "".join(texts)


# -- answers ----------------------------------------------------------------------------------------------------


def finish_reason(generation: Generation) -> str | None:
    """`stop` or `length`; None while it runs."""
    return "stop" if generation.finish in (EOS, STOP) else generation.finish


def usage(generation: Generation) -> dict[str, int]:
    """Tokens of prompt and answer."""
    num_prompt, num_new = len(generation.request.prompt), generation.num_tokens
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


def frame(request: OpenAiRequest, model_id: str, chunk: bool) -> dict[str, Any]:
    """What every answer, and every chunk of a stream, begins with."""
    kind = ("chat.completion" + ".chunk" * chunk) if request.is_chat else "text_completion"
    return {
        "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{request.id}",
        "object": kind,
        "created": request.created,
        "model": model_id,
        "system_fingerprint": f"wisp-{__version__}",
    }


def choice(
    request: OpenAiRequest, text: str, tokens: Sequence[Token], finish: str | None, chunk: bool, offset: int = 0
) -> dict[str, Any]:
    """The one choice of an answer or of a chunk; `offset`: characters of the answer before this chunk."""
    body: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
    if request.is_chat:
        message = {"content": text} if chunk else {"role": "assistant", "content": text}
        body["delta" if chunk else "message"] = message
    else:
        body["text"] = text
    if request.logprobs:
        body["logprobs"] = _chat_logprobs(tokens) if request.is_chat else _logprobs(tokens, offset)
    return body


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    content = [
        {"token": t.text, "logprob": t.logprob, "bytes": list(t.text.encode()), "top_logprobs": []} for t in tokens
    ]
    return {"content": content, "refusal": None}


def _logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    texts, logprobs = [t.text for t in tokens], [t.logprob for t in tokens]
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def answer(
    request: OpenAiRequest, model_id: str, generation: Generation, tokens: Sequence[Token], text: str
) -> dict[str, Any]:
    """The whole answer."""
    only = choice(request, text, tokens, finish_reason(generation), chunk=False)
    return frame(request, model_id, chunk=False) | {"choices": [only], "usage": usage(generation)}
