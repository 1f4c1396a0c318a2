"""Equality without exception: with a fixed schedule, what the draft model said leaves no trace in the output.

`record` serves several sessions (free and sync, greedy and sampled, starting one after another, prefills in chunks)
with the real engine, scheduler and verifier and with drafts of the real draft model, and writes down every pass and
every release of KV. `replay` is the target alone on the same schedule: it runs passes of exactly the same shapes
(per session: cached tokens, new tokens, drafts), but every draft token that did not become a committed token is
replaced by another id.

What remains in the replay's input are the committed tokens, and at the positions where they were chosen it must choose
them again, with log-probabilities equal bit for bit: no tie is allowed, as no shape has changed. By induction over the
passes the replay's input is then its own earlier output; it depends on the target, the parameters and the schedule,
and on nothing that the draft model said. Hence so does the recorded run, whose output is the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.live import make_open
from bench.lossless_reference import Case
from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.config import EngineConfig
from wisp_plugin.coupling import count_accepted
from wisp_plugin.engine import Engine
from wisp_plugin.errors import WispError
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.kv_admission import KvAccount
from wisp_plugin.messages import Commit, Draft, Mode, Open, PassItem, PassOutcome, Tokens
from wisp_plugin.protocols import Verifier
from wisp_plugin.scheduler import make_scheduler

_PASS_TOKENS = 96  # at most: so small that prefills come in chunks, beside verification
_TICK_S = 1e-3  # the clock of these runs: it counts looks at it, so that runs are repeatable

# The draft chain to be sent behind the committed tokens of a session; None: send nothing before the next pass.
DraftChain = Callable[[Open, Tokens], Tokens | None]
DraftToken = Callable[[Open, Tokens], int]  # the draft token of a session behind tokens


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """What went into a pass and what came out."""

    items: tuple[PassItem, ...]
    outcomes: tuple[PassOutcome, ...]


@dataclass(slots=True)
class Recorder:
    """A verifier that writes down what it is asked; `events` holds passes and, as their names, released sessions."""

    inner: Verifier
    events: list[RecordedPass | str] = field(default_factory=list)

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """See `Verifier.run`."""
        kept = tuple(dataclasses.replace(item, tokens=item.tokens.copy()) for item in items)  # they are views
        outcomes = self.inner.run(items)
        self.events.append(RecordedPass(kept, tuple(outcomes)))
        return outcomes

    def release(self, session: str) -> None:
        """See `Verifier.release`."""
        self.inner.release(session)
        self.events.append(session)

    @property
    def passes(self) -> list[RecordedPass]:
        """The passes alone."""
        return [event for event in self.events if isinstance(event, RecordedPass)]


@dataclass(slots=True)
class Stream:
    """The answer to one request, kept."""

    tokens: list[int] = field(default_factory=list)
    is_done: bool = False

    def send(self, commit: Commit) -> None:
        """See `Reply.send`."""
        self.tokens.extend(commit.tokens.tolist())

    def finish(self) -> None:
        """See `Reply.finish`."""
        self.is_done = True

    def fail(self, message: str) -> None:
        """Nothing in these runs may fail."""
        raise WispError(f"the engine refused a request of the benchmark: {message}")

    def is_cancelled(self) -> bool:
        """See `Reply.is_cancelled`."""
        return False


# A replay has no scheduler that would share prefixes, and nobody is refused.
ALONE: dict[str, Any] = {"policy": "continuous", "prefix_sharing": False, "max_load": 0.0}


def make_engine(verifier: Verifier, kv: KvAccount, config: EngineConfig) -> Engine:
    """A real engine without a thread, on a clock of its own."""
    ticks = itertools.count()
    estimator = Estimator(Costs(memory=(0.03, 0, 0, 0, 0, 0), arithmetic=(0.01, 0, 0.003, 0, 0, 0)))
    return Engine(make_scheduler(config, kv, estimator), verifier, config, clock=lambda: next(ticks) * _TICK_S)


def drive(engine: Engine, opens: Sequence[Open], draft_chain: DraftChain, opens_per_step: int) -> dict[str, Tokens]:
    """Serve `opens` to their end, drafts from `draft_chain`; all tokens of each session, prompt included."""
    waiting = deque(opens)
    running: dict[str, tuple[Open, Stream]] = {}
    final: dict[str, Tokens] = {}
    while waiting or running:
        for opened in [waiting.popleft() for _ in range(min(opens_per_step, len(waiting)))]:
            running[opened.session] = opened, Stream()
            engine.submit(opened, running[opened.session][1])
        for opened, stream in running.values():
            committed = np.concatenate([opened.tokens, np.array(stream.tokens, np.int32)])
            chain = draft_chain(opened, committed)
            if chain is not None:
                engine.submit(Draft(opened.session, len(committed), len(committed), chain), Stream())
        engine.step()
        for session, (opened, stream) in list(running.items()):
            if stream.is_done:
                final[session] = np.concatenate([opened.tokens, np.array(stream.tokens, np.int32)])
                del running[session]
    return final


def chains_of_random_length(draft: DraftToken, max_length: int, rng: np.random.Generator) -> DraftChain:
    """Chains of 0 to `max_length` tokens of `draft`; sometimes no message at all."""

    def chain(opened: Open, committed: Tokens) -> Tokens | None:
        length = min(int(rng.integers(-1, max_length + 1)), opened.end - 1 - len(committed))
        if length < 0 or (length == 0 and opened.mode is Mode.FREE):
            return None
        tokens = committed
        for _ in range(length):
            tokens = np.append(tokens, np.int32(draft(opened, tokens)))
        return tokens[len(committed) :]

    return chain


def fixed_opens(
    groups: Sequence[Sequence[Case]], num_sessions: int, max_new_tokens: int, eos_token_ids: tuple[int, ...]
) -> list[Open]:
    """Sessions that take turns in `groups` of cases and in both modes."""
    opens = []
    for i in range(num_sessions):
        group = groups[i % len(groups)]
        case, mode = group[i // 2 % len(group)], (Mode.FREE, Mode.SYNC)[i // 2 % 2]
        opened = make_open(case.prompt, max_new_tokens, mode, case.sampling, eos_token_ids)
        opens.append(dataclasses.replace(opened, session=f"{i:032x}", logprobs=True))
    return opens


def record(
    verifier: TorchVerifier, opens: Sequence[Open], draft: DraftToken, max_length: int, seed: int
) -> tuple[Recorder, dict[str, Tokens]]:
    """Serve `opens` with drafts of random lengths on a fresh `verifier`: the passes, and all tokens of each session."""
    recorder = Recorder(verifier)
    engine = make_engine(recorder, verifier.pool, EngineConfig(**ALONE, max_pass_tokens=_PASS_TOKENS))
    chains = chains_of_random_length(draft, max_length, np.random.default_rng(seed))
    return recorder, drive(engine, opens, chains, opens_per_step=1)


def without_drafts(item: PassItem, final: Tokens, vocab_size: int, rng: np.random.Generator) -> tuple[PassItem, int]:
    """`item` with every draft token replaced that is not a committed token of `final`, and how many were kept."""
    first = item.first_choice_position
    num_kept = count_accepted(item.tokens[first:], final[first:])
    tokens = item.tokens.copy()
    for at in range(first + num_kept, len(tokens)):
        excluded = {int(tokens[at]), int(final[at]) if at < len(final) else -1}
        tokens[at] = next(token for token in iter(lambda: int(rng.integers(vocab_size)), None) if token not in excluded)
    return dataclasses.replace(item, tokens=tokens), num_kept


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What the replay gave. `mismatches` are lines that tell session, position and both choices."""

    num_passes: int
    num_choices: int  # committed positions compared
    num_replaced: int  # draft tokens that were replaced
    mismatches: tuple[str, ...]


def replay(
    verifier: Verifier, recorded: Recorder, final: Mapping[str, Tokens], vocab_size: int, seed: int
) -> ReplayResult:
    """Run the recorded schedule on a fresh `verifier`, without the drafts. Stops behind a pass that differs."""
    rng = np.random.default_rng(seed)
    num_passes = num_choices = num_replaced = 0
    mismatches: list[str] = []
    for event in recorded.events:
        if isinstance(event, str):
            verifier.release(event)
            continue
        masked = [without_drafts(item, final[item.session], vocab_size, rng) for item in event.items]
        outcomes = verifier.run([item for item, _ in masked])
        num_passes += 1
        for (item, num_kept), before, now in zip(masked, event.outcomes, outcomes, strict=True):
            num_replaced += item.num_draft_tokens - num_kept
            own = final[item.session][item.first_choice_position :][: min(item.num_choices, num_kept + 1)]
            num_choices += len(own)
            mismatches += _compare(item, own, before, now)
        if mismatches:
            break
    return ReplayResult(num_passes, num_choices, num_replaced, tuple(mismatches))


def _compare(item: PassItem, own: Tokens, before: PassOutcome, now: PassOutcome) -> list[str]:
    """Differences at the positions of the committed tokens `own`, one line each."""
    lines = []
    for i, token in enumerate(own.tolist()):
        where = f"session {item.session[-4:]}, position {item.first_choice_position + i}"
        if not token == before.chosen[i] == now.chosen[i]:
            lines.append(f"{where}: committed {token}, chosen {before.chosen[i]}, replayed {now.chosen[i]}")
        elif before.logprobs is not None and now.logprobs is not None and before.logprobs[i] != now.logprobs[i]:
            lines.append(f"{where}: log-probability {before.logprobs[i]!r}, replayed {now.logprobs[i]!r}")
    return lines
