"""Clients that lose answers, repeat themselves and forget, in any order: the text is the target's all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import session_id
from tests.fakes import draft_token, target_alone
from tests.test_unary_engine import EIGHT, Server, ask, wrong
from wisp_plugin.messages import Status
from wisp_plugin.unary_wire import VerifyAnswer, VerifyRequest


class Client:
    """A client that loses answers, repeats itself, and forgets what the server knows."""

    def __init__(self, number: int, prompt: list[int], session: bool) -> None:
        self.name = session_id(number) if session else ""
        self.prompt, self.tokens = prompt, list(prompt)
        self.text = target_alone(np.array(prompt), len(prompt) + 8)
        self.parameters = {"prompt_len": len(prompt), **EIGHT}

    def request(self, back: int, num_drafts: int, spoilt: int, prefix: int) -> VerifyRequest:
        """A request from up to `back` tokens ago, for a prefix that the server may hold or not."""
        known = self.tokens[: max(len(self.prompt), len(self.tokens) - back)]
        draft = list(known)
        for i in range(num_drafts):
            token = draft_token(np.array(draft, np.int32))
            draft.append(wrong(token) if i == spoilt else token)
        prefix_len = min(prefix, len(known)) if self.name else 0
        given = {} if prefix_len else self.parameters
        return ask(known[prefix_len:], draft[len(known) :], prefix_len, self.name, **given)

    def take(self, request: VerifyRequest, answer: Any, loses: bool) -> None:
        """Check an answer, and believe it unless it is lost."""
        assert isinstance(answer, VerifyAnswer), answer
        if answer.status is Status.NEED_PREFIX:
            assert request.prefix_len
            return
        at = request.num_committed
        end = at + len(answer.tokens)
        assert answer.tokens.tolist() == self.text[at:end]
        num_right = 0
        while num_right < len(request.draft) and at + num_right < len(self.text):
            if request.draft[num_right] != self.text[at + num_right]:
                break
            num_right += 1
        assert answer.num_accepted == num_right
        assert len(answer.tokens) == min(num_right + 1, len(self.text) - at)
        assert (answer.status is Status.LENGTH) == (end == len(self.text))
        if not loses and end > len(self.tokens):
            self.tokens = self.text[:end]


steps = st.tuples(
    st.integers(0, 3),  # client
    st.integers(0, 6),  # back
    st.integers(0, 5),  # drafts
    st.integers(0, 5),  # the draft token that is spoilt
    st.integers(0, 14),  # prefix
    st.booleans(),  # the answer is lost
)


@settings(max_examples=150, deadline=None)
@given(
    batches=st.lists(st.lists(steps, min_size=1, max_size=5), min_size=1, max_size=12),
    num_blocks=st.integers(6, 16),
    max_sessions=st.integers(1, 4),
    max_pass_tokens=st.integers(1, 12),
    sharing=st.booleans(),
    pause_s=st.sampled_from([0.0, 4.0]),
)
def test_any_order_of_requests_gives_the_targets_text(
    batches: list[list[tuple[int, int, int, int, int, bool]]],
    num_blocks: int,
    max_sessions: int,
    max_pass_tokens: int,
    sharing: bool,
    pause_s: float,
) -> None:
    server = Server(
        num_blocks,
        max_sessions=max_sessions,
        max_pass_tokens=max_pass_tokens,
        prefix_sharing=sharing,
        linger_s=10.0,
    )
    clients = [Client(i, [1, 2, i // 2, 4, 5], session=i < 3) for i in range(4)]
    for batch in batches:
        asked = [(clients[step[0]], clients[step[0]].request(*step[1:5]), step[5]) for step in batch]
        for (client, request, loses), answer in zip(asked, server.ask(*(a[1] for a in asked)), strict=True):
            client.take(request, answer, loses)
        server.clock.now_s += pause_s
    assert len(server.engine.sessions) <= max_sessions


whole_requests = st.tuples(
    st.integers(1, 9),  # tokens of the text
    st.booleans(),  # the last of them is another
    st.sampled_from([{}, {"prompt_len": 3}, {"prompt_len": 5}]),
    st.sampled_from([{}, {"max_new_tokens": 4}, {"max_new_tokens": 8, "seed": 1}]),
    st.sampled_from([{}, {"ignore_eos": True}, {"eos_token_ids": "0,2"}]),
    st.integers(0, 3),  # drafts
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(whole_requests, min_size=1, max_size=3), min_size=1, max_size=6), st.booleans())
def test_a_request_with_all_tokens_is_answered_whatever_is_held(batches: list[list[Any]], sharing: bool) -> None:
    def request(length: int, spoilt: bool, prompt: Any, limit: Any, eos: Any, num_drafts: int) -> VerifyRequest:
        text = target_alone(np.array([1, 2, 3]), 12)
        tokens = [*text[: length - 1], wrong(text[length - 1]) if spoilt else text[length - 1]]
        return ask(tokens, text[length : length + num_drafts], **prompt, **limit, **eos)

    server = Server(prefix_sharing=sharing)
    for batch in batches:
        asked = [request(*step) for step in batch]
        for one, answer in zip(asked, server.ask(*asked), strict=True):
            assert str(answer) == str(Server().ask(one)[0])
