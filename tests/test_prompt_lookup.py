"""Drafts from the text itself: what is guessed, how much of it is sent, what is learnt from commits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.factories import ids, make_commit, session_id
from wisp_plugin.messages import Commit, Draft, Origin, Status
from wisp_plugin.prompt_lookup import MAX_DRAFT_TOKENS, NgramIndex, PromptLookup, num_worth

PHRASE = [11, 12, 13, 14, 15, 16, 17, 18]


def commit(start: int, *tokens: int, price: float = 0.05, status: Status = Status.RUNNING) -> Commit:
    """A commit at `start`."""
    origin = np.full(len(tokens), Origin.DECODED, np.uint8)
    return Commit(session_id(1), start, ids(*tokens), origin, status, load_price=price)


def lookup(*prompt: int, end: int = 1000, drafts: bool = True) -> PromptLookup:
    """The drafts of a session behind `prompt`."""
    return PromptLookup(session_id(1), ids(*prompt), end, drafts)


def index(*tokens: int) -> NgramIndex:
    found = NgramIndex()
    found.extend(tokens)
    return found


def test_the_longest_and_then_the_newest_match_counts() -> None:
    assert index(1, 2, 3, 9, 2, 3, 8, 1, 2, 3).guess(1) == ([9], 3)
    assert index(2, 3, 9, 2, 3, 8, 2, 3).guess(2) == ([8, 2], 2)
    assert index(5, 1, 2, 3, 7, 6, 1, 2, 3, 8, 5, 1, 2, 3).guess(1) == ([7], 4)


def test_without_a_match_there_is_no_guess() -> None:
    assert index().guess(4) == ([], 0)
    assert index(1).guess(4) == ([], 0)
    assert index(1, 2, 3, 2).guess(4) == ([], 0)


def test_a_text_that_goes_in_circles_is_guessed_to_go_on() -> None:
    assert index(1, 2, 1, 2).guess(5) == ([1, 2, 1, 2, 1], 2)
    assert index(7, 7, 7).guess(3) == ([7, 7, 7], 2)


@given(tokens=st.lists(st.integers(0, 3), max_size=40), cuts=st.integers(1, 5), num=st.integers(1, 8))
def test_a_guess_followed_the_same_tokens_before(tokens: list[int], cuts: int, num: int) -> None:
    found = NgramIndex()
    for at in range(0, len(tokens), cuts):
        found.extend(tokens[at : at + cuts])
    guess, length = found.guess(num)
    assert len(found) == len(tokens)
    pairs = {tuple(tokens[i : i + 2]) for i in range(len(tokens) - 2)}  # those that something follows
    assert bool(guess) == (tuple(tokens[-2:]) in pairs)
    if guess:
        last = tokens[-length:]
        whole = [*tokens, *guess]
        before = [i for i in range(len(tokens) - length) if tokens[i : i + length] == last]
        assert whole[before[-1] + length : before[-1] + length + num] == guess


def test_a_repeated_phrase_is_drafted() -> None:
    drafts = lookup(*PHRASE, 1, 2, *PHRASE[:3])
    draft = drafts.on_commit(commit(13, 14))
    assert isinstance(draft, Draft)
    assert (draft.session, draft.start, draft.seen, draft.next_us) == (session_id(1), 14, 14, -1)
    assert draft.tokens.dtype == np.int32
    assert draft.tokens.tolist() == [*PHRASE[4:], 1, 2, *PHRASE[:4]][: len(draft.tokens)]
    assert draft.survival is not None
    assert draft.survival.dtype == np.uint8
    assert (np.diff(draft.survival.astype(int)) < 0).all()
    assert draft.survival[0] == round(255 * drafts.acceptance(4))


def test_what_does_not_pay_is_not_sent() -> None:
    assert num_worth(0.5, 0.0) == 3  # 0.5, 0.25, 0.125; the next would be below one in ten
    assert num_worth(0.5, 0.2) == 1  # 0.25 is below one and a half times the price
    assert num_worth(0.5, 0.4) == 0
    assert num_worth(0.05, 0.0) == 0
    assert num_worth(1.0, 0.01) == MAX_DRAFT_TOKENS
    assert lookup(*PHRASE, 1, 2, *PHRASE[:3]).on_commit(commit(13, 14, price=0.9)) is None


def test_wrong_guesses_end_drafting_and_right_ones_bring_it_back() -> None:
    """Guesses that are not sent are compared too."""
    drafts, at = lookup(*PHRASE), 8
    before = drafts.acceptance(4)
    num_sent = []
    for _ in range(12):  # the phrase's beginning, and then always something else
        for token in [*PHRASE[:4], 100 + at]:
            draft = drafts.on_commit(commit(at, token))
            at += 1
        num_sent.append(draft is not None)
    assert drafts.acceptance(4) < 0.2 < before
    for _ in range(6):
        for token in PHRASE:
            draft = drafts.on_commit(commit(at, token))
            at += 1
    assert drafts.acceptance(4) > 0.6
    assert draft is not None


def test_a_commit_counts_up_to_its_first_difference() -> None:
    prompt = [*PHRASE, 1, 2, *PHRASE[:4]]
    ways = {"right": PHRASE[4:7], "first wrong": [99], "second wrong": [PHRASE[4], 99]}
    learnt = {}
    for way, tokens in ways.items():
        drafts = lookup(*prompt[:-1])
        drafts.on_commit(commit(13, prompt[-1]))
        drafts.on_commit(commit(14, *tokens))
        learnt[way] = drafts.acceptance(4)
    assert learnt["first wrong"] < learnt["second wrong"] < learnt["right"]
    assert lookup(*prompt).acceptance(4) < learnt["right"]


def test_there_is_no_draft_at_the_end() -> None:
    assert lookup(*PHRASE, *PHRASE[:3], end=13).on_commit(commit(11, 14)) is None
    draft = lookup(*PHRASE, *PHRASE[:3], end=14).on_commit(commit(11, 14))
    assert draft is not None
    assert draft.tokens.tolist() == [15]
    assert lookup(*PHRASE, *PHRASE[:3]).on_commit(commit(11, 14, status=Status.EOS)) is None


@pytest.mark.parametrize("drafts", [True, False])
def test_commits_are_acknowledged(drafts: bool) -> None:
    """A session that drafts nothing must not be paused for it."""
    session = lookup(1, drafts=drafts)
    answers = [session.on_commit(commit(1 + i, 1000 + i)) for i in range(130)]
    acks = [answer for answer in answers if answer is not None]
    assert [(a.start, a.seen, len(a.tokens)) for a in acks] == [(65, 65, 0), (129, 129, 0)]


def test_without_drafting_nothing_is_drafted() -> None:
    assert lookup(*PHRASE, *PHRASE[:3], drafts=False).on_commit(commit(11, 14)) is None


def test_a_commit_without_tokens_changes_nothing() -> None:
    drafts = lookup(*PHRASE, *PHRASE[:4])
    assert drafts.on_commit(make_commit(12)) is not None
