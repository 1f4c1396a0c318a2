"""The routes of OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.routing import Route

from edge_runtime.gateway import openai
from edge_runtime.gateway.errors import Refusal
from edge_runtime.gateway.generation import Generation, Times
from edge_runtime.gateway.http import DONE, Caller, event
from edge_runtime.gateway.service import Answer, Endpoint, Gateway, guarded, json_answer, work_headers

_MADE_S = 0  # of a model file nobody knows when it was made


def routes(gateway: Gateway) -> list[Route]:
    """The routes of OpenAI on `gateway`."""

    def on(endpoint: Endpoint) -> Any:
        return guarded(gateway, endpoint, Refusal.openai)

    return [
        Route("/v1/models", on(_models)),
        Route("/v1/models/{model:path}", on(_model)),
        Route("/v1/completions", on(_completions(is_chat=False)), methods=["POST"]),
        Route("/v1/chat/completions", on(_completions(is_chat=True)), methods=["POST"]),
    ]


def _completions(is_chat: bool) -> Endpoint:
    async def endpoint(gateway: Gateway, http: Caller, times: Times) -> Answer:
        device = gateway.device
        wanted = await gateway.parsed(http, lambda body: openai.parse(body, device.tokenizer, device.limits, is_chat))
        if wanted.stream:
            return await gateway.stream(
                http, wanted.generation, times, lambda g: _events(wanted, device.model_id, g), _failed
            )
        generation, tokens, text = await gateway.whole(http, wanted.generation, times)
        return json_answer(openai.answer(wanted, device.model_id, generation, tokens, text), work_headers(generation))

    return endpoint


def _failed(refusal: Refusal) -> bytes:
    return event(refusal.openai())


async def _events(
    wanted: openai.OpenAiRequest, model_id: str, generation: Generation
) -> AsyncGenerator[bytes, None]:
    """Chunks; the first of a chat tells the role, and comes with the first tokens."""
    frame = openai.frame(wanted, model_id, chunk=True)
    if wanted.include_usage:
        frame["usage"] = None
    offset, opening = 0, b""
    if wanted.is_chat:
        role = openai.choice(wanted, "", [], None, chunk=True)
        role["delta"]["role"] = "assistant"
        opening = event(frame | {"choices": [role]})
    async for batch in generation:
        text = "".join(token.text for token in batch.tokens) + batch.tail
        only = openai.choice(wanted, text, batch.tokens, None, chunk=True, offset=offset)
        offset += len(text)
        yield opening + (event(frame | {"choices": [only]}) if text or wanted.logprobs else b"")
        opening = b""
    last = openai.choice(wanted, "", [], openai.finish_reason(generation), chunk=True, offset=offset)
    if wanted.is_chat:
        last["delta"] = {}
    last["logprobs"] = None
    yield event(frame | {"choices": [last]})
    if wanted.include_usage:
        yield event(frame | {"choices": [], "usage": openai.usage(generation)})
    yield DONE


def _card(gateway: Gateway) -> dict[str, Any]:
    return {"id": gateway.device.model_id, "object": "model", "created": _MADE_S, "owned_by": "wisp"}


async def _models(gateway: Gateway, http: Caller, times: Times) -> Answer:
    return json_answer({"object": "list", "data": [_card(gateway)]})


async def _model(gateway: Gateway, http: Caller, times: Times) -> Answer:
    name = http.path_params["model"]
    if name != gateway.device.model_id:
        raise Refusal(404, "not_found", f"there is no model {name!r}; there is {gateway.device.model_id!r}", "model")
    return json_answer(_card(gateway))
