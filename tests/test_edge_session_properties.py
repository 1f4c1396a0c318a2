"""The device's side under any order of draft steps, commits, lost connections and statuses."""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.factories import SESSION, ids, make_commit, make_open, same
from wisp_plugin.controller import Abstention, Chain, SpeculationController, StopRule
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.edge_session import DraftJob, EdgeSession, Step
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Commit, Draft, Mode, Origin, Status, Timing
from wisp_plugin.pace import Pace
from wisp_plugin.stop_rules import AdaEdl, Fixed, Paper, Price, Ratio, Svip

EOS = 9
PROMPT = (1, 2, 3)


class Moody:
    """A rule without any sense: it says yes and no as time goes by."""

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        return bool(zlib.crc32(repr(now_s).encode()) % 3)

    def waits(self, chain: Chain, pace: Pace) -> bool:
        return True

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        assert 0 <= num_right <= num_drafted


class Link:
    """A session, the text that its target gives, and what the server knows of the chain by the rules of section 6."""

    def __init__(self, text: list[int], mode: Mode, rule: StopRule, message_tokens: int | None, rests: bool) -> None:
        self.opened = make_open(PROMPT, len(text), mode=mode, eos_token_ids=(EOS,))
        self.target = [*PROMPT, *text]
        controller = SpeculationController(rule, abstention=Abstention() if rests else None)
        self.session = EdgeSession(self.opened, controller, message_tokens)
        self.now_s = 5.0
        self.job: DraftJob | None = None
        self.count: Counter[str] = Counter()
        self.reopen()

    # -- events -------------------------------------------------------------------------------------------------

    def do(self, name: str, number: int) -> None:
        self.now_s += 1e-3 * number
        getattr(self, name)(number)
        self.check()

    def step(self, number: int = 0) -> None:
        """Begin the draft step, or send the message, that is due."""
        step = self.session.next_step(self.now_s)
        if step is Step.SEND:
            self.take(self.session.take_message(self.now_s))
            self.session.on_sent(1e-4 * number)
        elif step is Step.DRAFT and self.job is None:
            self.job = self.session.begin_draft()

    def finish(self, number: int = 0) -> None:
        """End the draft step that runs: right two times out of three, sometimes an end token."""
        if self.job is None:
            return
        job, self.job = self.job, None
        right = self.target[len(job.context)] if len(job.context) < len(self.target) else 0
        stats = DraftStats(0.8, 0.5, 0.6, 2.0, 0.8) if number % 2 else None
        fits = np.array_equal(job.context, self.session.context())
        is_kept = self.session.on_drafted(job, (right, right, (right + 1) % 10)[number % 3], 1e-3 * number, stats)
        self.count["drafted"] += 1
        self.count["interrupted"] += not is_kept
        assert fits or not is_kept
        if self.opened.mode is Mode.FREE:
            assert is_kept == fits

    def draft(self, number: int = 0) -> None:
        """A draft token from its begin to its message, with nothing in between."""
        self.step(number)
        self.finish(number)
        self.step(number)

    def commit(self, number: int = 0) -> None:
        """A pass: it accepts what it has got of the chain, or as much of it as `number` lets it, and adds a token."""
        if self.is_done or not self.is_due:
            return
        at, chain, most = len(self.session.committed), self.buffer, number % 6
        right = self.target[at:]
        num_right = next((i for i, (a, b) in enumerate(zip(chain, right, strict=False)) if a != b), len(chain))
        num_accepted = min(num_right, most, len(right))
        is_rejection = num_accepted == num_right < len(chain) and num_right < most
        own = Origin.CORRECTION if is_rejection else Origin.BONUS if num_accepted else Origin.DECODED
        self.deliver([Origin.ACCEPTED] * num_accepted + [own])

    def catch_up(self, number: int = 0) -> None:
        """What the server had committed while the connection was lost, or faster than any draft."""
        if not self.is_done:
            self.deliver([Origin.DECODED] * (1 + number % 5))

    def word(self, number: int = 0) -> None:
        """A status without tokens."""
        if not self.is_done:
            self.session.on_commit(make_commit(len(self.session.committed)), self.now_s)

    def wrong(self, number: int = 0) -> None:
        """A commit that does not fit changes nothing."""
        at, before = len(self.session.committed), self.session.context().tolist()
        for commit in (make_commit(at + 1, 5), make_commit(at, *[5] * (self.opened.end - at + 1))):
            with pytest.raises(TransportError):
                self.session.on_commit(commit, self.now_s)
        assert self.session.context().tolist() == before

    def reopen(self, number: int = 0) -> None:
        """The connection was lost: the server's side of the chain is gone."""
        if self.is_done:
            return
        opened = self.session.reopen()
        assert opened.tokens.tolist() == self.session.committed.tolist()
        assert (opened.session, opened.prompt_len, opened.end) == (SESSION, 3, self.opened.end)
        self.buffer: list[int] = []
        self.buffer_end = self.seen = 0
        self.is_due = self.opened.mode is Mode.FREE or not len(self.session.generated)

    # -- both sides ---------------------------------------------------------------------------------------------

    def deliver(self, origins: list[Origin]) -> None:
        """Commit the target's next tokens; an end token or the limit ends the session there."""
        at = len(self.session.committed)
        tokens = self.target[at : at + len(origins)]
        if EOS in tokens:
            tokens = tokens[: tokens.index(EOS) + 1]
        is_end = at + len(tokens) == len(self.target)
        status = Status.EOS if tokens[-1] == EOS else Status.LENGTH if is_end else Status.RUNNING
        origin = np.array(origins[: len(tokens)], np.uint8)
        chain_before = len(self.session.chain)
        commit = Commit(SESSION, at, ids(*tokens), origin, status, Timing(measured_us=20_000))
        assert self.session.on_commit(commit, self.now_s).tolist() == tokens
        self.count["left the chain"] += chain_before - len(self.session.chain)
        self.count["accepted"] += int(np.count_nonzero(origin == Origin.ACCEPTED))
        self.is_due = self.opened.mode is Mode.FREE
        kept = len(tokens) < len(self.buffer) and self.buffer[: len(tokens)] == tokens
        self.buffer = self.buffer[len(tokens) :] if kept and self.opened.mode is Mode.FREE else []

    def take(self, message: Draft) -> None:
        """A message arrives at once: START = SEEN replaces the buffer, START > SEEN continues the message before."""
        self.count["messages"] += 1
        self.count["sent"] += len(message.tokens)
        at, tokens = len(self.session.committed), message.tokens.tolist()
        assert message.seen == at >= self.seen
        self.seen, self.is_due = message.seen, True
        if message.start == message.seen:
            self.buffer = tokens
        else:
            assert message.start == self.buffer_end, "a gap"
            self.buffer = self.buffer + tokens
        self.buffer_end = message.end
        assert self.buffer == self.session.chain.tolist(), "the server holds another chain than the device"
        assert message.end <= self.opened.end - 1
        if not tokens:
            assert (message.survival, message.next_us) == (None, -1)
            return
        assert message.survival is not None
        believed = self.session.controller.survival()[message.start - at :]
        assert message.survival.tolist() == np.rint(255 * np.array(believed)).tolist()
        assert len(message.survival) == len(tokens)
        assert (np.diff(message.survival.astype(int)) <= 0).all()
        assert message.next_us == -1 or self.opened.mode is Mode.FREE

    @property
    def is_done(self) -> bool:
        return self.session.status is not Status.RUNNING

    def check(self) -> None:
        session, stats, count = self.session, self.session.stats, self.count
        assert session.committed.tolist() == self.target[: len(session.committed)]
        assert len(session.controller.survival()) == len(session.chain)
        assert stats.num_drafted == count["drafted"]
        assert stats.num_drafted == stats.num_interrupted + count["left the chain"] + len(session.chain)
        assert stats.num_interrupted == count["interrupted"]
        assert (stats.num_messages, stats.num_sent) == (count["messages"], count["sent"])
        assert stats.num_accepted == count["accepted"] <= count["left the chain"]
        assert 0.0 <= stats.useful_drafting_s <= stats.drafting_s + 1e-9
        assert 0.0 <= stats.wdt_share <= 1.0
        assert stats.num_committed == len(session.generated)
        assert (session.next_step(self.now_s) is Step.DONE) == self.is_done


EVENTS = ("step", "step", "finish", "draft", "draft", "draft", "commit", "catch_up", "word", "wrong", "reopen")
rules = st.sampled_from([Moody, lambda: Fixed(6), lambda: Fixed(0), Svip, AdaEdl, Paper, Ratio, Price])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(st.lists(st.integers(0, 8), max_size=60), st.integers(0, EOS)).map(lambda text: [*text[0], text[1]]),
    st.sampled_from(Mode),
    rules,
    st.sampled_from([None, 1, 2, 5]),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 30)), max_size=150),
)
def test_any_order_of_events(
    text: list[int], mode: Mode, rule: Any, message_tokens: int | None, rests: bool, events: list[tuple[str, int]]
) -> None:
    link = Link(text, mode, rule(), message_tokens, rests)
    for name, number in events:
        link.do(name, number)
    for number in range(100 * len(text)):
        for name in ("step", "finish", "step", "finish", "step", "commit"):
            link.do(name, number)
        if link.is_done:
            break
    assert link.is_done
    assert link.session.next_step(link.now_s) is Step.DONE
    assert link.session.generated.tolist() == text
    assert link.session.status is (Status.EOS if text[-1] == EOS else Status.LENGTH)
    event(f"{mode.value}, {'some' if link.count['accepted'] else 'no'} drafts accepted")


def test_equal_events_give_equal_messages() -> None:
    def run() -> list[Any]:
        link, sent = Link([5] * 40, Mode.FREE, Fixed(6), None, True), []
        link.take = sent.append  # type: ignore[method-assign]
        link.check = lambda: None  # type: ignore[method-assign]
        for number in range(200):
            for name in ("step", "finish"):
                link.do(name, number % 17)
        return sent

    assert all(same(a, b) for a, b in zip(run(), run(), strict=True))
