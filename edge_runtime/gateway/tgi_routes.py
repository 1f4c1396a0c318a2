"""The routes of Text Generation Inference: /, /generate, /generate_stream, /tokenize, /info, /health, /metrics."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.routing import Route

from edge_runtime.gateway import tgi
from edge_runtime.gateway.errors import Refusal, unhealthy
from edge_runtime.gateway.generation import Generation, Times, Token
from edge_runtime.gateway.http import Caller, event
from edge_runtime.gateway.parameters import MAX_STOP_STRINGS
from edge_runtime.gateway.service import Answer, Endpoint, Gateway, guarded, json_answer, work_headers
from wisp_plugin import __version__


def routes(gateway: Gateway) -> list[Route]:
    """The routes of TGI on `gateway`."""

    def on(endpoint: Endpoint) -> Any:
        return guarded(gateway, endpoint, Refusal.tgi)

    return [
        Route("/", on(_generate(stream=None, as_list=True)), methods=["POST"]),
        Route("/generate", on(_generate(stream=False, as_list=False)), methods=["POST"]),
        Route("/generate_stream", on(_generate(stream=True, as_list=False)), methods=["POST"]),
        Route("/tokenize", on(_tokenize), methods=["POST"]),
        Route("/info", on(_info)),
        Route("/health", on(_healthy)),
        Route("/metrics", on(_metrics)),
    ]


def _generate(stream: bool | None, as_list: bool) -> Endpoint:
    async def endpoint(gateway: Gateway, http: Caller, times: Times) -> Answer:
        device = gateway.device
        wanted = await gateway.parsed(http, lambda body: tgi.parse(body, device.tokenizer, device.limits, stream))
        if wanted.stream:
            failed = _failed_tgi
            return await gateway.stream(http, wanted.generation, times, lambda g: _tgi_events(wanted, g), failed)
        generation, tokens, text = await gateway.whole(http, wanted.generation, times)
        body = tgi.answer(wanted, generation, tokens, text)
        return json_answer([body] if as_list else body, work_headers(generation))

    return endpoint


def _failed_tgi(refusal: Refusal) -> bytes:
    return event(refusal.tgi())


async def _tgi_events(wanted: tgi.TgiRequest, generation: Generation) -> AsyncGenerator[bytes, None]:
    text, index, token = "", 0, None
    async for batch in generation:
        chunks = []
        for token in batch.tokens:
            index += 1
            text += token.text
            is_last = batch.finish is not None and token is batch.tokens[-1]
            chunks.append(b"" if is_last else event(tgi.stream_event(index, token)))
        if batch.finish is not None:
            assert token is not None, "a text has at least one token"
            if not batch.tokens:  # the end came alone: what is left of the text goes with the last token's place
                token = Token(token.id, batch.tail, token.origin, token.logprob, True)
            chunks.append(event(tgi.last_event(wanted, generation, token, text + batch.tail)))
        yield b"".join(chunks)


async def _tokenize(gateway: Gateway, http: Caller, times: Times) -> Answer:
    return json_answer(await gateway.parsed(http, lambda body: tgi.tokenized(body, gateway.device.tokenizer)))


async def _info(gateway: Gateway, http: Caller, times: Times) -> Answer:
    device, sessions = gateway.device, gateway.sessions
    return json_answer(
        {
            "model_id": device.model_id, "model_sha": None, "model_pipeline_tag": "text-generation",
            "model_dtype": None, "model_device_type": "cpu", "max_concurrent_requests": sessions.max_requests,
            "max_best_of": 1, "max_stop_sequences": MAX_STOP_STRINGS,
            "max_input_tokens": device.limits.max_total_tokens - 1, "max_total_tokens": device.limits.max_total_tokens,
            "validation_workers": 1, "max_client_batch_size": 1, "router": "wisp-edge", "version": __version__,
            "sha": None, "docker_label": None, "max_sessions": sessions.max_sessions,
            "draft_model": device.draft_name, "rule": device.rule_name,
        }
    )  # fmt: skip


async def _healthy(gateway: Gateway, http: Caller, times: Times) -> Answer:
    if not await gateway.is_healthy():
        raise unhealthy("unhealthy: the server does not answer, or its model is not ready")
    return PlainTextResponse("")


async def _metrics(gateway: Gateway, http: Caller, times: Times) -> Answer:
    return PlainTextResponse(gateway.metrics.text(gateway.sessions), media_type="text/plain; version=0.0.4")
