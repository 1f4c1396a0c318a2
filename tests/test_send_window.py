"""A way up that swallows drafts: what is sent without a sign of arrival has a bound."""

from __future__ import annotations

from tests.factories import make_commit, make_open
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession, Step
from wisp_plugin.send_window import SendWindow
from wisp_plugin.stop_rules import Fixed


def test_a_way_up_that_is_stalled_does_not_fill_up() -> None:
    """Every commit is the server's own token and breaks the chain; nothing that was sent has arrived."""
    session = EdgeSession(make_open(max_new_tokens=4_000), SpeculationController(Fixed(16)), message_tokens=1)
    now_s, num_at = 0.0, {}
    for position in range(3, 2_000):
        for _ in range(40):
            step = session.next_step(now_s)
            if step is Step.DRAFT:
                session.on_drafted(session.begin_draft(), 5, 0.002)
            elif step is Step.SEND:
                session.take_message(now_s)
        session.on_commit(make_commit(position, 6), now_s)
        now_s += 0.05
        num_at[position] = session.stats.num_sent
    assert num_at[3 + 20] <= 128 + 32  # the first second
    assert num_at[3 + 1_200] <= 128 + 11 * 32  # the first minute: tries after pauses up to 8 s
    assert session.stats.num_sent < 0.02 * 16 * 2_000
    assert session.stats.num_messages < 2 * session.stats.num_sent  # nor with empty messages


def test_a_sign_of_arrival_opens_the_window() -> None:
    window = SendWindow()
    for _ in range(127):
        window.on_sent(1, 1.0)
    assert window.is_open(1.0)
    window.on_sent(1, 1.0)
    assert [window.is_open(now_s) for now_s in (1.0, 1.49, 1.5)] == [False, False, True]
    window.on_sent(32, 1.5)
    assert [window.is_open(now_s) for now_s in (1.5, 2.4, 2.5)] == [False, False, True]
    window.on_sign()
    assert window.is_open(1.5)
    window.on_sent(127, 1.5)
    assert window.is_open(1.5)
