"""The shapes of Text Generation Inference 3: request bodies to `GenerationRequest`, tokens to answers.

Differences, all on purpose: a field that is not known is refused; `do_sample` false, when it is given, means greedy
even beside a `temperature` (TGI samples); the text ends before a stop string (TGI keeps the string); a special token
has an empty `text`, so that the pieces of a stream joined are the `generated_text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.gateway.generation import Generation, Token
from edge_runtime.gateway.parameters import (
    Fields,
    GenerationRequest,
    Limits,
    check_room,
    room,
    sampling,
    seed_of,
)
from edge_runtime.tokenizer import Tokenizer
from wisp_plugin.messages import Sampling

DEFAULT_NEW_TOKENS = 100
_NEUTRAL: dict[str, Sequence[Any]] = {
    "best_of": (1,),
    "decoder_input_details": (False,),
    "frequency_penalty": (0, 0.0),
    "typical_p": (1, 1.0),
    "top_n_tokens": (0,),
    "watermark": (False,),
    "grammar": (),
    "adapter_id": (),
}


@dataclass(frozen=True, slots=True)
class TgiRequest:
    """A checked body of /generate, /generate_stream or /."""

    generation: GenerationRequest
    details: bool
    full_text: bool
    stream: bool


def parse(body: Mapping[str, Any], tokenizer: Tokenizer, limits: Limits, stream: bool | None) -> TgiRequest:
    """The request that `body` is. `stream` None: the body's field `stream` decides (route `/`). Raises Refusal."""
    fields = Fields(body)
    inputs = fields.text("inputs", required=True)
    assert inputs is not None
    asked = fields.flag("stream")
    if stream is not None and asked is not None and asked != stream:
        raise fields.refuse("stream", "what the route says: /generate does not stream, /generate_stream does")
    raw = fields.get("parameters")
    if raw is not None and not isinstance(raw, dict):
        raise fields.refuse("parameters", "an object")
    fields.done()
    parameters = Fields(raw or {}, "parameters.")
    stream = bool(asked) if stream is None else stream
    details, full_text = bool(parameters.flag("details")), bool(parameters.flag("return_full_text"))
    parameters.unsupported(_NEUTRAL)
    generation = _generation(inputs, parameters, tokenizer, limits, logprobs=details or stream)
    parameters.done()
    return TgiRequest(generation, details, full_text, stream)


def _generation(
    inputs: str, parameters: Fields, tokenizer: Tokenizer, limits: Limits, logprobs: bool
) -> GenerationRequest:
    truncate = parameters.whole("truncate", 1, limits.max_total_tokens - 1)
    wanted = parameters.whole("max_new_tokens", 1, 2**32 - 1)
    chosen = _sampling(parameters, limits)
    stop = parameters.stop_strings("stop")
    prompt = tokenizer.encode(inputs)
    if truncate is not None:
        prompt = prompt[-truncate:].copy()
    left = room(prompt, limits)
    if wanted is not None:
        check_room(wanted, prompt, limits, "max_new_tokens")
    return GenerationRequest(
        prompt=prompt,
        prompt_text=inputs,
        max_new_tokens=min(DEFAULT_NEW_TOKENS, left) if wanted is None else wanted,
        sampling=chosen,
        stop=stop,
        logprobs=logprobs,
    )


def _sampling(parameters: Fields, limits: Limits) -> Sampling:
    """TGI samples if it is told to, or if a value that only matters for sampling is given."""
    do_sample = parameters.flag("do_sample")
    temperature = parameters.number("temperature", 0.0, 100.0, above_low=True)
    top_k = parameters.whole("top_k", 1, limits.vocab_size)
    top_p = parameters.number("top_p", 1e-9, 1.0)
    implied = temperature not in (None, 1.0) or top_k is not None or (top_p is not None and top_p < 1.0)
    is_sampled = implied if do_sample is None else do_sample
    temperature = 1.0 if temperature is None else temperature
    return sampling(parameters, is_sampled, temperature, seed_of(parameters), top_p, top_k)


def token_json(token: Token) -> dict[str, Any]:
    """A token as TGI tells it."""
    return {"id": token.id, "text": token.text, "logprob": token.logprob, "special": token.special}


def _seed(generation: Generation) -> int | None:
    chosen = generation.request.sampling
    return None if chosen.greedy else chosen.seed


def _full(request: TgiRequest, text: str) -> str:
    return request.generation.prompt_text + text if request.full_text else text


def answer(request: TgiRequest, generation: Generation, tokens: Sequence[Token], text: str) -> dict[str, Any]:
    """The answer of /generate."""
    body: dict[str, Any] = {"generated_text": _full(request, text)}
    if request.details:
        body["details"] = {
            "finish_reason": generation.finish,
            "generated_tokens": generation.num_tokens,
            "seed": _seed(generation),
            "prefill": [],
            "tokens": [token_json(token) for token in tokens],
        }
    return body


def stream_event(index: int, token: Token) -> dict[str, Any]:
    """An event of /generate_stream; `index` counts tokens from 1."""
    return {"index": index, "token": token_json(token), "generated_text": None, "details": None}


def last_event(request: TgiRequest, generation: Generation, token: Token, text: str) -> dict[str, Any]:
    """The event that ends a stream; `text` is all of it."""
    details = {
        "finish_reason": generation.finish,
        "generated_tokens": generation.num_tokens,
        "seed": _seed(generation),
        "input_length": len(request.generation.prompt),
    }
    return stream_event(generation.num_tokens, token) | {"generated_text": _full(request, text), "details": details}


def tokenized(body: Mapping[str, Any], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The answer of /tokenize. Raises Refusal."""
    fields = Fields(body)
    inputs = fields.text("inputs", required=True)
    assert inputs is not None
    add_special = fields.flag("add_special_tokens")
    fields.get("parameters")  # TGI takes a whole generate request here; they change nothing about the tokens
    fields.done()
    pieces = tokenizer.pieces(inputs, add_special is not False)
    return [{"id": i, "text": inputs[start:end], "start": start, "stop": end} for i, start, end in pieces]
