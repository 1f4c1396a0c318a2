"""The nouns: one frozen dataclass per arrow of the design's picture.

    edge ── Open / Draft / Close ──▶ server          (DESIGN.md section 6)
    edge ◀── Commit ──────────────── server
    Scheduler ── BatchPlan ──▶ Verifier ── PassOutcome ──▶ Scheduler

Positions are absolute and 0-based, the prompt included. Token arrays are int32 and one-dimensional.
Checks of values that come from outside are in `wire.py`; `__post_init__` holds invariants only.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Origins = npt.NDArray[np.uint8]  # values of `Origin`
PROTOCOL_VERSION = 1


class Origin(enum.IntEnum):
    """Where a committed token came from."""

    DECODED = 0
    ACCEPTED = 1
    CORRECTION = 2
    BONUS = 3


_ACCEPTED = int(Origin.ACCEPTED)


class Status(enum.IntEnum):
    """State of a session as told by a commit or a unary answer. All but RUNNING end the response stream."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2
    CLOSED = 3
    SUPERSEDED = 4
    CONFLICT = 5
    OVERLOADED = 6
    NEED_PREFIX = 7  # unary only: the server does not hold the prefix, all tokens have to be sent again


class Mode(enum.StrEnum):
    """`free`: nobody waits (section 4). `sync`: one commit per draft, the device waits for it."""

    FREE = "free"
    SYNC = "sync"


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objective of one session, measured at the client.

    `name` is the class of the server's configuration that it came from (empty: given by the client in numbers).
    """

    ttft_ms: float
    tpot_ms: float
    name: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from logits (section 3). `top_k` 0 and `top_p` 1.0 switch the filters off."""

    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    banned_token_ids: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        """True if the choice is a plain argmax."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Open:
    """Start or resume a session. `tokens` holds every committed token that the client has."""

    session: str
    tokens: Tokens
    prompt_len: int
    max_new_tokens: int
    sampling: Sampling
    slo: Slo
    mode: Mode = Mode.FREE
    eos_token_ids: tuple[int, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        assert 0 < self.prompt_len <= len(self.tokens) <= self.end, "tokens hold the prompt and end within the limit"

    @property
    def end(self) -> int:
        """Absolute position behind the last token that the session may commit."""
        return self.prompt_len + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Draft:
    """Draft tokens from absolute position `start`, drafted when `seen` tokens were committed at the device.

    `survival[i]` is the probability x 255 that the chain is still right at token i (None: unknown);
    `next_us` the time to the next message (-1: none before a commit).
    """

    session: str
    start: int
    seen: int
    tokens: Tokens
    survival: npt.NDArray[np.uint8] | None = None
    next_us: int = -1

    @property
    def end(self) -> int:
        """Absolute position behind the last draft token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Close:
    """The client needs no more tokens of this session."""

    session: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of the pass behind a commit, in microseconds.

    `waited_us`: from the arrival of the newest draft that the pass used (without one: of the session's
    last commit or open) to the start of the pass; `measured_us`: forward and choice of tokens.
    """

    waited_us: int = 0
    predicted_us: int = 0
    measured_us: int = 0
    num_sessions: int = 0


@dataclass(frozen=True, slots=True)
class Commit:
    """What one pass gave a session: `tokens[i]` is final at position `start + i`."""

    session: str
    start: int
    tokens: Tokens
    origin: Origins
    status: Status = Status.RUNNING
    timing: Timing = field(default_factory=Timing)
    logprobs: npt.NDArray[np.float32] | None = None
    load_next_pass_s: float = 0.0
    load_price: float = 0.0
    retry_after_ms: int | None = None

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.origin), "one origin per token"

    @property
    def end(self) -> int:
        """Absolute position behind the last committed token."""
        return self.start + len(self.tokens)

    @property
    def last_origin(self) -> int:
        """Origin of the last token, if there is one: a plain integer, as comparing NumPy's with an Enum is slow."""
        return self.origin.item(-1)

    @property
    def num_accepted(self) -> int:
        """Accepted draft tokens of its device."""
        return self.origin.tobytes().count(_ACCEPTED)


@dataclass(slots=True)  # not frozen: that would double the time to make one, and a plan makes one per member
class PassItem:
    """One session's part of a pass.

    The verifier computes positions `num_cached` to `len(tokens)` of `tokens` (committed tokens, then
    `num_draft_tokens` draft tokens). It chooses a token behind the last committed token and behind each
    draft token, that is `num_draft_tokens + 1` of them, unless `is_prefill_chunk`: then the tokens stop
    short of the committed end and nothing is chosen.

    `num_to_draft`: so many draft tokens more, which the server makes itself behind `tokens` before the pass
    (`server_drafts`); they are part of the counts below.
    """

    session: str
    tokens: Tokens
    num_cached: int
    num_draft_tokens: int
    sampling: Sampling
    is_prefill_chunk: bool = False
    logprobs: bool = False
    reason: str = ""
    num_to_draft: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.num_cached < len(self.tokens) - self.num_draft_tokens, "a pass computes a committed token"
        assert not self.is_prefill_chunk or not self.num_draft_tokens + self.num_to_draft, "a chunk carries no drafts"

    @property
    def num_new_tokens(self) -> int:
        """Tokens of this session that the pass computes."""
        return len(self.tokens) - self.num_cached + self.num_to_draft

    @property
    def num_choices(self) -> int:
        """Tokens that the verifier chooses for this session."""
        return 0 if self.is_prefill_chunk else self.num_draft_tokens + self.num_to_draft + 1

    @property
    def first_choice_position(self) -> int:
        """Absolute position of the first token to be chosen."""
        return len(self.tokens) - self.num_draft_tokens


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One pass as data: who takes part, whose KV is dropped before it, what it is expected to cost.

    `price`: commits displaced by one more draft token (section 7). `wake_s`: when to plan again if nothing
    arrives meanwhile; it matters for a plan without items, whose sessions are all held.
    """

    items: tuple[PassItem, ...] = ()
    evict: tuple[str, ...] = ()
    predicted_s: float = 0.0
    price: float = 0.0
    num_held: int = 0  # sessions that could have taken part and are held back
    num_trimmed_tokens: int = 0  # buffered draft tokens of members that are left out
    wake_s: float = math.inf

    def __post_init__(self) -> None:
        assert len({item.session for item in self.items}) == len(self.items), "a session takes part once"

    @property
    def num_new_tokens(self) -> int:
        """Tokens that the pass computes."""
        return sum(item.num_new_tokens for item in self.items)


@dataclass(frozen=True, slots=True)
class PassOutcome:
    """The target's own tokens for one session of a pass: `chosen[i]` stands at `first_choice_position + i`.

    `chosen` is int32 `[num_choices]`; choices behind the first difference to the draft mean nothing.
    `logprobs` is float32 of the same length if asked for: of the chosen tokens, from the distribution
    before filters at temperature 1. `drafted`: what the server drafted behind the item's tokens, at most
    `num_to_draft` tokens (None: nothing).
    """

    session: str
    chosen: Tokens
    logprobs: npt.NDArray[np.float32] | None = None
    drafted: Tokens | None = None
