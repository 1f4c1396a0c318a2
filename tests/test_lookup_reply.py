"""Drafts that the server makes itself, through the real engine: same tokens, fewer passes."""

from __future__ import annotations

import pytest

from tests.factories import ids, make_open
from tests.fakes import VOCAB_SIZE, FakeClock, FakeReply, FakeVerifier, make_engine, target_alone
from triton_models.lookup_reply import LookupReply
from wisp_plugin.config import EngineConfig
from wisp_plugin.prompt_lookup import NgramIndex, PromptLookup

NUM_TOKENS = 200


def serve(lookup: str, config: EngineConfig | None = None) -> tuple[FakeReply, FakeVerifier]:
    """A session of `NUM_TOKENS` behind a prompt that holds most of what the target will say."""
    clock, verifier, reply = FakeClock(), FakeVerifier(num_blocks=512), FakeReply()
    engine = make_engine(verifier, clock, config)
    prompt = ids(1, 2, 3)
    opened = make_open(prompt, max_new_tokens=NUM_TOKENS)
    drafts = PromptLookup(opened.session, opened.tokens, opened.end, drafts=lookup == "auto")
    engine.submit(opened, LookupReply(reply, engine.submit, drafts))
    for _ in range(2 * NUM_TOKENS):
        engine.step()
        clock.now_s += 0.01
        if reply.ended:
            break
    assert reply.finished
    assert reply.tokens == target_alone(prompt, len(prompt) + NUM_TOKENS)[len(prompt) :]
    return reply, verifier


def test_drafts_save_passes_and_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that knows the future stands for a text that repeats itself."""
    future = target_alone(ids(1, 2, 3), 3 + NUM_TOKENS + 30)
    _, plain = serve("off")
    monkeypatch.setattr(NgramIndex, "guess", lambda self, num: (future[len(self) : len(self) + num], 4))
    _, drafted = serve("auto")
    assert len(plain.passes) == NUM_TOKENS
    assert len(drafted.passes) < NUM_TOKENS / 4


def test_wrong_drafts_change_no_token_and_cease(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [(token + 1) % VOCAB_SIZE for token in target_alone(ids(1, 2, 3), 3 + NUM_TOKENS + 30)]
    monkeypatch.setattr(NgramIndex, "guess", lambda self, num: (wrong[len(self) : len(self) + num], 4))
    _, verifier = serve("auto")
    drafted = [sum(item.num_draft_tokens for item in items) for items in verifier.passes]
    assert sum(drafted[:20]) > 0
    assert sum(drafted[20:]) == 0


def test_a_long_session_is_not_paused_for_want_of_acknowledgements() -> None:
    for lookup in ("auto", "off"):
        serve(lookup, EngineConfig(max_unacked_tokens=128))
