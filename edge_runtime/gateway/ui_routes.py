"""The stream behind the page at /ui: commits with the origin of every token, and the draft chain ahead of them.

Each event is a JSON object with a `type`: `open` first, then `draft` (the whole chain now ahead of the last commit, at
most every `DRAFT_PERIOD_S`) and `commit`, at last `end` or `error`. Positions count from the first generated token.
The `tail` of the last commit is text that was held back and belongs to no token of it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse
from starlette.routing import Route

from edge_runtime.gateway.device import GatewayDevice
from edge_runtime.gateway.errors import Refusal
from edge_runtime.gateway.generation import Batch, Generation, Times
from edge_runtime.gateway.http import Caller, EventStream, event
from edge_runtime.gateway.openai import chat_prompt
from edge_runtime.gateway.parameters import Fields, GenerationRequest, Limits, check_room, room, sampling, seed_of
from edge_runtime.gateway.service import Answer, Endpoint, Gateway, guarded
from edge_runtime.gateway.speculation import ChainView
from edge_runtime.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("ui") / "index.html"
DRAFT_PERIOD_S = 0.05
DEFAULT_NEW_TOKENS = 256
_CONTEXT_TOKENS = 8  # committed tokens in front of a chain that its text may depend on
_RATE_S = 3.0  # tokens per second are those of the last seconds


def parse(body: Mapping[str, Any], tokenizer: Tokenizer, limits: Limits) -> GenerationRequest:
    """The request that the page sends. Raises Refusal."""
    fields = Fields(body)
    prompt, text = chat_prompt(fields.get("messages"), tokenizer)
    wanted = fields.whole("max_new_tokens", 1, 2**32 - 1)
    temperature = fields.number("temperature", 0.0, 100.0) or 0.0
    top_p = fields.number("top_p", 1e-9, 1.0)
    chosen = sampling(fields, temperature > 0.0, temperature, seed_of(fields), top_p, None)
    drafts = fields.flag("draft") is not False
    fields.done()
    left = room(prompt, limits, "messages")
    if wanted is not None:
        check_room(wanted, prompt, limits, "max_new_tokens", "messages")
    num_new = min(DEFAULT_NEW_TOKENS, left) if wanted is None else wanted
    return GenerationRequest(prompt, text, num_new, chosen, drafts=drafts)


def routes(gateway: Gateway) -> list[Route]:
    """The page and its stream."""

    def on(endpoint: Endpoint) -> Any:
        return guarded(gateway, endpoint, Refusal.tgi)

    return [Route("/ui", on(_page)), Route("/ui/stream", on(_stream), methods=["POST"])]


async def _page(gateway: Gateway, http: Caller, times: Times) -> Answer:
    if not PAGE.is_file():
        raise Refusal(404, "not_found", "this installation has no page; the other routes work")
    return FileResponse(PAGE, media_type="text/html", headers={"cache-control": "no-cache"})


async def _stream(gateway: Gateway, http: Caller, times: Times) -> Answer:
    """`open` goes out at once: the page shows that something happens while a server that is away is waited for."""
    device = gateway.device
    wanted = await gateway.parsed(http, lambda body: parse(body, device.tokenizer, device.limits))

    async def events() -> AsyncGenerator[bytes, None]:
        yield event(opening(device, wanted))
        try:
            async with gateway.session(http, wanted, times) as generation:
                async for chunk in Screen(device, generation).events():
                    yield chunk
        except Refusal as refusal:
            gateway.count(refusal.error_type)
            yield event({"type": "error", "error": str(refusal)})

    stream = events()
    return EventStream(http, stream, {}, stream.aclose, gateway.on_hangup)


def opening(device: GatewayDevice, request: GenerationRequest) -> dict[str, Any]:
    """The first event."""
    drafts = request.drafts and device.speculation is not None
    return {
        "type": "open",
        "prompt_tokens": len(request.prompt),
        "draft_model": device.draft_name if drafts else "none",
        "rule": device.rule_name if drafts else "none",
    }


class Screen:
    """What the page has been told, and what it is to be told next."""

    def __init__(self, device: GatewayDevice, generation: Generation) -> None:
        self._device, self._generation = device, generation
        self._ids = [int(t) for t in generation.request.prompt[-_CONTEXT_TOKENS:]]
        self._num_commits = self._num_tokens = self._num_struck = 0
        self._chain: ChainView | None = None
        self._drafted_s = 0.0
        self._recent = [(time.monotonic(), 0)]

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Events behind `open`, until the text has ended. Raises as the generation does."""
        generation = self._generation
        while generation.finish is None:
            await generation.arrival(DRAFT_PERIOD_S)
            while (batch := generation.poll()) is not None:
                yield event(self._commit(batch))
            chain = self._new_chain()
            if chain is not None and generation.finish is None:
                yield event(self._draft(chain))
        yield event({"type": "end", "finish_reason": generation.finish, "generated_tokens": generation.num_tokens})

    def _commit(self, batch: Batch) -> dict[str, Any]:
        start = self._num_tokens
        self._num_tokens += len(batch.tokens)
        self._num_commits += 1
        self._ids = (self._ids + [token.id for token in batch.tokens])[-_CONTEXT_TOKENS:]
        struck = self._generation.run.controller.window.num_struck
        num_struck, self._num_struck = struck - self._num_struck, struck
        tokens = [{"text": token.text, "origin": token.origin.name.lower()} for token in batch.tokens]
        told = {"start": start, "tokens": tokens, "tail": batch.tail, "struck": num_struck, "stats": self._stats()}
        return {"type": "commit", **told}

    def _stats(self) -> dict[str, Any]:
        stats, window = self._generation.stats, self._generation.run.controller.window
        num_judged = stats.num_accepted + stats.num_corrections
        return {
            "tokens_per_s": self._rate(time.monotonic()),
            "acceptance_rate": stats.num_accepted / num_judged if num_judged else 0.0,
            "wdt_share": stats.wdt_share,
            "round_trip_ms": 1e3 * window.rtt_s,
            "choice": window.choice,
        }

    def _rate(self, now_s: float) -> float:
        """Tokens per second over the last `_RATE_S`, or since the beginning."""
        self._recent.append((now_s, self._num_tokens))
        while len(self._recent) > 2 and self._recent[1][0] < now_s - _RATE_S:
            self._recent.pop(0)
        (first_s, first), (last_s, last) = self._recent[0], self._recent[-1]
        return (last - first) / max(last_s - first_s, 1e-3)

    def _new_chain(self) -> ChainView | None:
        """The chain, if it has changed, is not behind or ahead of what the page knows, and is due to be told."""
        chain, now_s = self._generation.run.controller.window.chain, time.monotonic()
        if chain is self._chain or chain.num_commits != self._num_commits or now_s < self._drafted_s + DRAFT_PERIOD_S:
            return None
        self._chain, self._drafted_s = chain, now_s
        return chain

    def _draft(self, chain: ChainView) -> dict[str, Any]:
        text = self._device.tokenizer.detokenizer(self._ids)
        texts = [text.push([token]) for token in chain.tokens]
        if texts:
            texts[-1] += text.flush()
        survival = [round(value, 4) for value in chain.survival]
        return {"type": "draft", "start": self._num_tokens, "texts": texts, "survival": survival}
