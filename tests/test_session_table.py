"""Who is held, for how long, and what may resume."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.factories import give_pass, ids, make_draft, make_open, make_session, session_id
from tests.fakes import FakeReply
from wisp_plugin.errors import UnknownSession
from wisp_plugin.messages import Mode, Origin, Sampling, Slo, Status
from wisp_plugin.server_session import ServerSession
from wisp_plugin.session_table import SessionTable


def with_tokens(*generated: int, **values: Any) -> ServerSession:
    """A session whose passes gave `generated` behind the prompt 1, 2, 3."""
    session = make_session(**values)
    for token in generated:
        give_pass(session, token)
    return session


# -- the table --------------------------------------------------------------------------------------------------


def test_attach_detach_attach() -> None:
    table, session, first, second = SessionTable(60.0, 8), make_session(), FakeReply(), FakeReply()
    table.attach(session, first)
    assert (table.num_attached, table.find(session.id), table.reply(session.id)) == (1, session, first)
    assert table.detach(session.id, 1.0) is first
    assert (table.num_attached, table.find(session.id)) == (0, session)
    assert table.detach(session.id, 2.0) is None
    table.attach(session, second)
    assert table.attached() == [(session, second)]
    table.expire(1e9)  # only what has no stream expires
    assert table.get(session.id) is session


def test_a_second_stream_without_detaching_the_first_is_a_defect() -> None:
    table = SessionTable(60.0, 8)
    table.attach(make_session(), FakeReply())
    with pytest.raises(AssertionError):
        table.attach(make_session(), FakeReply())


def test_lingering_ends() -> None:
    table = SessionTable(linger_s=60.0, max_detached=8)
    for number in (1, 2):
        table.attach(make_session(session=session_id(number)), FakeReply())
        table.detach(session_id(number), 10.0 * number)
    table.expire(69.9)
    assert table.get(session_id(1)) is not None
    table.expire(70.0)
    assert table.get(session_id(1)) is None
    assert table.get(session_id(2)) is not None
    with pytest.raises(UnknownSession, match=r"session 00000000\.\.\. is not known here; open it first"):
        table.find(session_id(1))


def test_a_second_detachment_lingers_from_its_own_time() -> None:
    table = SessionTable(linger_s=60.0, max_detached=8)
    session = make_session()
    for now_s in (0.0, 50.0):
        table.attach(session, FakeReply())
        table.detach(session.id, now_s)
    table.expire(100.0)
    assert table.get(session.id) is session


def test_the_one_that_waited_longest_goes_first_when_there_are_too_many() -> None:
    table = SessionTable(60.0, max_detached=2)
    for number in range(3):
        table.attach(make_session(session=session_id(number)), FakeReply())
    for number in (1, 0, 2):
        table.detach(session_id(number), 1.0)
    assert [table.get(session_id(number)) is not None for number in range(3)] == [True, False, True]


# -- what may resume --------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {"sampling": Sampling(seed=5, temperature=0.5), "eos_token_ids": (2,)}
OPENED = make_open(**VALUES)


@pytest.mark.parametrize(
    "other",
    [
        {"max_new_tokens": 9},
        {"prompt_len": 2, "tokens": ids(1, 2)},
        {"sampling": Sampling(seed=6, temperature=0.5)},
        {"sampling": Sampling(seed=5, temperature=0.6)},
        {"slo": Slo(1000.0, 99.0)},
        {"mode": Mode.SYNC},
        {"eos_token_ids": ()},
        {"logprobs": True},
        {"tokens": ids(1, 2, 4)},
        {"tokens": ids(1, 2, 3, 10, 12)},
        {"tokens": ids(1, 2, 3, 10, 12, 13)},
    ],
)
def test_what_contradicts_cannot_resume(other: dict[str, Any]) -> None:
    held = with_tokens(10, 11, **VALUES)
    assert not held.conflicts_with(OPENED)
    assert held.conflicts_with(dataclasses.replace(OPENED, **other))


@pytest.mark.parametrize("num_known", [3, 4, 5, 6, 7])
def test_either_side_may_be_ahead(num_known: int) -> None:
    held = with_tokens(10, 11, **VALUES)
    both = ids(1, 2, 3, 10, 11, 12, 13)
    opened = dataclasses.replace(OPENED, tokens=both[:num_known])
    assert not held.conflicts_with(opened)
    commit = held.resume(opened, 5.0)
    assert held.committed.tolist() == both[: max(5, num_known)].tolist()
    assert held.num_acked == num_known
    if num_known >= 5:
        assert commit is None
    else:
        assert commit is not None
        assert (commit.start, commit.end, commit.status) == (num_known, 5, Status.RUNNING)
        assert np.array_equal(commit.tokens, both[num_known:5])


def test_catching_up_tells_the_origins_again() -> None:
    held = make_session(max_new_tokens=8)
    held.on_draft(make_draft(3, 10, 11), 0.0)
    give_pass(held, 10, 11, 12)
    commit = held.resume(make_open(), 2.0)
    assert commit is not None
    assert commit.origin.tolist() == [Origin.ACCEPTED, Origin.ACCEPTED, Origin.BONUS]


def test_resumption_starts_the_chain_and_the_round_anew() -> None:
    held = with_tokens(10, mode=Mode.SYNC)
    held.on_draft(make_draft(4, 5, 6), 1.0)
    assert held.is_due
    held.resume(dataclasses.replace(held.opened, tokens=ids(1, 2, 3, 10)), 2.0)
    assert not held.is_due
    held.on_draft(make_draft(6, 7, seen=4), 2.0)
    assert held.num_buffered == 0


@pytest.mark.parametrize(
    ("last", "values", "status"),
    [(2, {"eos_token_ids": (2,)}, Status.EOS), (11, {"max_new_tokens": 2}, Status.LENGTH)],
)
def test_a_finished_session_tells_its_end_again(last: int, values: dict[str, Any], status: Status) -> None:
    session = with_tokens(10, last, **values)
    for num_known in (3, 5):
        tokens = ids(1, 2, 3, 10, last)[:num_known]
        commit = session.resume(dataclasses.replace(session.opened, tokens=tokens), 3.0)
        assert commit is not None
        assert (commit.status, commit.start, commit.end) == (status, num_known, 5)


@pytest.mark.parametrize(
    ("tokens", "values", "status"),
    [
        ((10, 2), {"eos_token_ids": (2,)}, Status.EOS),
        ((10, 11), {"max_new_tokens": 2}, Status.LENGTH),
        ((10, 2), {}, Status.RUNNING),
        ((), {"prompt": (1, 2), "eos_token_ids": (2,)}, Status.RUNNING),  # an EOS in the prompt ends nothing
    ],
)
def test_what_the_client_holds_may_be_the_end(tokens: tuple[int, ...], values: dict[str, Any], status: Status) -> None:
    prompt = values.get("prompt", (1, 2, 3))
    session = make_session(tokens=ids(*prompt, *tokens), **values)
    session.settle_status()
    assert session.status is status
    held = make_session(**values)
    held.resume(dataclasses.replace(held.opened, tokens=ids(*prompt, *tokens)), 1.0)
    assert held.status is status
