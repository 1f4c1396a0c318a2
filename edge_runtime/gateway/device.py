"""What the sessions of a gateway share: tokenizer, draft graph, the way to the server, and the device's options."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.client import EdgeClient, Patience
from edge_runtime.drafter import Drafter
from edge_runtime.drafting_thread import TokenDrafter
from edge_runtime.gateway.drafting import DraftDealer, DraftShare
from edge_runtime.gateway.parameters import GenerationRequest, Limits
from edge_runtime.gateway.speculation import GatedController
from edge_runtime.gateway.transport import LeavableTransport
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.transport import VerifyTransport
from wisp_plugin.acceptance_model import AcceptanceModel
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.messages import Mode, Open, Slo
from wisp_plugin.speculation import AUTO, make_controller, no_drafts
from wisp_plugin.stop_rules import DEFAULT_ENERGY_PRICE
from wisp_plugin.wire import new_session_id


@dataclass(frozen=True, slots=True)
class Speculation:
    """How sessions draft: a stop rule's name, what its controllers know, and the dealer of seats."""

    dealer: DraftDealer
    model: AcceptanceModel
    max_context_tokens: int
    draft_name: str
    rule: str = AUTO
    energy_price: float = DEFAULT_ENERGY_PRICE


@dataclass(slots=True)
class EdgeRun:
    """One session as the gateway drives it: the client, and the handles on its parts."""

    client: EdgeClient
    transport: LeavableTransport
    controller: GatedController
    share: DraftShare | None


@dataclass(slots=True)
class GatewayDevice:
    """Makes sessions. `connect` makes a transport for each, `is_ready` asks the server (may take a second or two).

    `prepare` is called when a session is over, in a thread that may wait: it may make ready for the next.
    """

    tokenizer: Tokenizer
    limits: Limits
    slo: Slo
    connect: Callable[[], VerifyTransport]
    is_ready: Callable[[], bool]
    model_id: str
    speculation: Speculation | None = None
    server_wait_s: float = 30.0
    prepare: Callable[[], None] = lambda: None

    @property
    def draft_name(self) -> str:
        """What drafts here."""
        return self.speculation.draft_name if self.speculation else "none"

    @property
    def rule_name(self) -> str:
        """The stop rule in use."""
        if self.speculation is None:
            return "none"
        return "price" if self.speculation.rule == AUTO else self.speculation.rule

    def start(self, request: GenerationRequest) -> EdgeRun:
        """The session of `request`, not open yet. `end` must follow."""
        opened = Open(
            session=new_session_id(),
            tokens=request.prompt,
            prompt_len=len(request.prompt),
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            slo=self.slo,
            mode=Mode.FREE,
            eos_token_ids=self.tokenizer.eos_token_ids,
            logprobs=request.logprobs,
        )
        drafting = self.speculation if request.drafts else None
        share = drafting.dealer.join(len(request.prompt)) if drafting else None
        inner = make_controller(drafting.rule, Mode.FREE, drafting.model, drafting.energy_price) if drafting else None
        controller = GatedController(inner or no_drafts(), share)
        limit = drafting.max_context_tokens if drafting else None
        session = EdgeSession(opened, controller, max_context_tokens=limit)
        transport = LeavableTransport(self.connect())
        patience = Patience(reconnect_s=self.server_wait_s)
        client = EdgeClient(opened, session, transport, share, patience, time.monotonic, transport.pause)
        return EdgeRun(client, transport, controller, share)

    def end(self, run: EdgeRun) -> None:
        """Leave the server and free the seat; takes up to about two seconds if the server does not answer."""
        run.transport.disarm()
        try:
            run.client.close()
        finally:
            if run.share is not None and self.speculation is not None:
                self.speculation.dealer.leave(run.share)


def make_dealer(folder: Path, num_threads: int, num_seats: int) -> tuple[DraftDealer, int]:
    """The dealer of the graph in `folder`, and the tokens that a draft may stand behind. Raises ModelError."""
    first = Drafter.load(folder, num_threads)
    spare = [first]

    def make() -> TokenDrafter:  # one call at a time: the dealer holds its lock
        return spare.pop() if spare else first.sibling()

    return DraftDealer(make, num_seats), first.max_context_tokens
