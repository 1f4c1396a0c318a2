"""Stand-ins with the contracts of the real collaborators: a target, a verifier, a reply, a clock."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.coupling import count_accepted
from wisp_plugin.engine import Engine
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import Commit, PassItem, PassOutcome, Status, Tokens
from wisp_plugin.scheduler import Continuous, Scheduler

VOCAB_SIZE = 7


def target_token(prefix: Tokens) -> int:
    """The fake target: a fixed function of the whole prefix."""
    return zlib.crc32(np.ascontiguousarray(prefix, np.int32).tobytes()) % VOCAB_SIZE


def draft_token(prefix: Tokens) -> int:
    """The fake draft model: the target's token about four times in five."""
    mood = zlib.crc32(np.ascontiguousarray(prefix, np.int32).tobytes() + b"draft")
    return target_token(prefix) if mood % 5 else mood // 5 % VOCAB_SIZE


def target_alone(prompt: Tokens, end: int, eos: Sequence[int] = ()) -> list[int]:
    """What the target generates behind `prompt` up to position `end` or an EOS."""
    tokens = [int(t) for t in prompt]
    while len(tokens) < end and not (len(tokens) > len(prompt) and tokens[-1] in eos):
        tokens.append(target_token(np.array(tokens, np.int32)))
    return tokens


@dataclass
class FakeClock:
    """Time that moves when told."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeReply:
    """Records an answer and holds its contract: commits, then exactly one end."""

    commits: list[Commit] = field(default_factory=list)
    finished: bool = False
    error: str | None = None
    cancelled: bool = False

    def send(self, commit: Commit) -> None:
        assert not self.ended, "a commit after the end"
        self.commits.append(commit)

    def finish(self) -> None:
        assert not self.ended, "a second end"
        self.finished = True

    def fail(self, message: str) -> None:
        assert not self.ended, "a second end"
        assert message
        assert "\n" not in message
        self.error = message

    def is_cancelled(self) -> bool:
        return self.cancelled

    @property
    def ended(self) -> bool:
        return self.finished or self.error is not None

    @property
    def tokens(self) -> list[int]:
        return [int(t) for commit in self.commits for t in commit.tokens]

    @property
    def status(self) -> Status:
        return self.commits[-1].status


class FakeVerifier:
    """The verifier's contract on `target_token`, with the real accounting of KV memory."""

    def __init__(
        self, num_blocks: int = 64, block_tokens: int = 4, on_run: Callable[[], None] = lambda: None
    ) -> None:
        self.pool = BlockPool(num_blocks, block_tokens)
        self.passes: list[tuple[PassItem, ...]] = []
        self._kv: dict[str, list[int]] = {}
        self._on_run = on_run

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        self._on_run()
        self.passes.append(tuple(items))
        return [self._run_one(item) for item in items]

    def _run_one(self, item: PassItem) -> PassOutcome:
        held = self._kv.get(item.session, [])
        assert held[: item.num_cached] == item.tokens[: item.num_cached].tolist(), "KV of another prefix"
        self.pool.truncate(item.session, item.num_cached)
        self.pool.extend(item.session, len(item.tokens))
        first = item.first_choice_position
        chosen = np.array([target_token(item.tokens[: first + i]) for i in range(item.num_choices)], np.int32)
        num_kept = len(item.tokens) if item.is_prefill_chunk else first + count_accepted(item.tokens[first:], chosen)
        self.pool.truncate(item.session, num_kept)
        self._kv[item.session] = item.tokens[:num_kept].tolist()
        self.pool.check_integrity()
        return PassOutcome(item.session, chosen)

    def release(self, session: str) -> None:
        self.pool.release(session)
        self._kv.pop(session, None)


def make_engine(
    verifier: FakeVerifier,
    clock: FakeClock,
    config: EngineConfig | None = None,
    on_failure: Callable[[], None] = lambda: None,
) -> Engine:
    """An engine without a thread: tests call `step`."""
    config = config or EngineConfig()
    return Engine(Scheduler(Continuous(), config, verifier.pool), verifier, config, clock, on_failure=on_failure)
