"""Unary verification on a fake target: whatever is repeated, forgotten or sent together, the text is the target's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.factories import ids, make_config, make_estimator, session_id
from tests.fakes import VOCAB_SIZE, FakeClock, FakeVerifier, target_alone
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import PassItem, PassOutcome, Status
from wisp_plugin.unary_engine import UnaryEngine
from wisp_plugin.unary_wire import NEED_PREFIX, VerifyAnswer, VerifyRequest
from wisp_plugin.wire import WireLimits

PROMPT = [1, 2, 3, 4, 5]
EIGHT = {"max_new_tokens": 8, "ignore_eos": True}
TEXT = target_alone(np.array(PROMPT), len(PROMPT) + 8)
S, OTHER = session_id(1), session_id(2)


class Verifier(FakeVerifier):
    """The fake verifier, with logprobs that tell the token they belong to."""

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        outcomes = super().run(items)
        return [dataclasses.replace(o, logprobs=-o.chosen.astype(np.float32)) for o in outcomes]


class Server:
    """An engine on the fake verifier. Every answer is checked against the target alone."""

    def __init__(self, num_blocks: int = 64, **config: Any) -> None:
        self.clock = FakeClock()
        self.verifier = Verifier(num_blocks)
        limits = WireLimits(VOCAB_SIZE, min(60, 4 * num_blocks), max_draft_ahead=16, eos_token_ids=(6,))
        self.engine = UnaryEngine(
            self.verifier, self.verifier.pool, limits, make_config(**config), make_estimator(), self.clock
        )

    def ask(self, *requests: VerifyRequest) -> list[Any]:
        answers = self.engine.serve(requests)
        self.verifier.pool.check_integrity()
        for items in self.verifier.passes:
            assert len({item.session for item in items}) == len(items)
        return answers

    @property
    def num_passes(self) -> int:
        return len(self.verifier.passes)


def ask(
    tokens: Sequence[int], draft: Sequence[int] = (), prefix_len: int = 0, session: str = S, **parameters: Any
) -> VerifyRequest:
    """A request; the first of a session names its parameters."""
    return VerifyRequest(session, prefix_len, ids(*tokens), ids(*draft), parameters)


def first(session: str = S, **parameters: Any) -> VerifyRequest:
    return ask(PROMPT, session=session, **(EIGHT | parameters))


def told(answer: Any) -> tuple[Status, int, list[int]]:
    assert isinstance(answer, VerifyAnswer), answer
    return answer.status, answer.num_accepted, answer.tokens.tolist()


def wrong(token: int) -> int:
    return (token + 1) % VOCAB_SIZE


# -- one request after the other --------------------------------------------------------------------------------


def test_a_session_round_by_round() -> None:
    server = Server()
    assert told(server.ask(first())[0]) == (Status.RUNNING, 0, TEXT[5:6])
    assert told(server.ask(ask([], TEXT[6:8], 6))[0]) == (Status.RUNNING, 2, TEXT[6:9])
    assert told(server.ask(ask([], [TEXT[9], wrong(TEXT[10])], 9))[0]) == (Status.RUNNING, 1, TEXT[9:11])
    assert told(server.ask(ask([], [], 11))[0]) == (Status.RUNNING, 0, TEXT[11:12])
    assert told(server.ask(ask([], TEXT[12:13], 12))[0]) == (Status.LENGTH, 1, TEXT[12:13])
    assert told(server.ask(ask([], [], 13))[0]) == (Status.LENGTH, 0, [])
    assert [item.num_new_tokens for (item,) in server.verifier.passes] == [5, 3, 3, 1, 1]
    assert server.verifier.pool.sessions() == (), "a session that has ended gives its KV back"


def test_a_prefix_that_lacks_the_last_answer_is_served_too() -> None:
    """The client may send the tokens of the last answer instead of counting them to the prefix."""
    server = Server()
    server.ask(first())
    assert told(server.ask(ask(TEXT[5:6], TEXT[6:7], 5))[0]) == (Status.RUNNING, 1, TEXT[6:8])
    assert [item.num_new_tokens for (item,) in server.verifier.passes] == [5, 2]


@pytest.mark.parametrize("draft", [[], TEXT[6:9], [TEXT[6], wrong(TEXT[7])], [wrong(TEXT[6])]])
def test_a_repeated_request_gets_the_same_answer_without_a_pass(draft: list[int]) -> None:
    server = Server()
    server.ask(first())
    request = ask([], draft, 6)
    answer = told(server.ask(request)[0])
    num_passes = server.num_passes
    assert told(server.ask(request)[0]) == answer
    assert told(server.ask(first())[0]) == (Status.RUNNING, 0, TEXT[5:6])
    assert server.num_passes == num_passes


def test_an_older_request_with_a_longer_draft_is_answered_in_full() -> None:
    server = Server()
    server.ask(first())
    server.ask(ask([], TEXT[6:7], 6))
    assert told(server.ask(ask([], TEXT[6:10], 6))[0]) == (Status.RUNNING, 4, TEXT[6:11])


def test_other_tokens_are_taken_for_what_the_client_wants() -> None:
    server = Server()
    server.ask(first())
    server.ask(ask([], TEXT[6:8], 6))
    other = [*TEXT[:6], wrong(TEXT[6])]
    expected = target_alone(np.array(other), 9)
    assert told(server.ask(ask([wrong(TEXT[6])], [], 6))[0]) == (Status.RUNNING, 0, expected[7:8])
    assert server.verifier.passes[-1][0].num_cached >= 4, "KV of the common part is used again"
    assert told(server.ask(ask([], [], 6))[0]) == (Status.RUNNING, 0, TEXT[6:7]), "its tokens are not the target's own"


def test_tokens_that_the_client_brings_are_not_taken_for_the_targets_own() -> None:
    server = Server()
    server.ask(first())
    made_up = [wrong(TEXT[6]), 0]
    expected = target_alone(np.array([*TEXT[:6], *made_up]), 9)
    assert told(server.ask(ask(made_up, [], 6))[0]) == (Status.RUNNING, 0, expected[8:9])
    assert told(server.ask(ask([], [], 6))[0]) == (Status.RUNNING, 0, TEXT[6:7])


def test_who_goes_on_behind_the_end_may() -> None:
    server, end = Server(), TEXT[5]
    server.ask(first(ignore_eos=False, eos_token_ids=str(end)))
    assert told(server.ask(ask([], [], 6))[0]) == (Status.EOS, 0, [])
    other = [*TEXT[:6], wrong(end)]
    expected = target_alone(np.array(other), 8)
    assert told(server.ask(ask([wrong(end)], [], 6))[0])[2] == expected[7:8]


def test_an_unknown_prefix_is_asked_for_and_all_tokens_help() -> None:
    server = Server()
    assert server.ask(ask([], [], 6)) == [NEED_PREFIX]
    server.ask(first())
    assert server.ask(ask([], [], 7)) == [NEED_PREFIX]
    everything = ask(TEXT[:8], TEXT[8:9], prompt_len=5, **EIGHT)
    assert told(server.ask(everything)[0]) == (Status.RUNNING, 1, TEXT[8:10])


def test_an_accepted_end_of_text_ends_the_answer() -> None:
    server, end = Server(), TEXT[7]
    server.ask(first(ignore_eos=False, eos_token_ids=str(end)))
    cut = TEXT[6 : TEXT.index(end, 6) + 1]
    status, num_accepted, tokens = told(server.ask(ask([], TEXT[6:11], 6))[0])
    assert (status, num_accepted, tokens) == (Status.EOS, len(cut), cut)
    assert told(server.ask(ask([], TEXT[6:11], 6))[0]) == (Status.EOS, len(cut), cut)


def test_without_a_session_nothing_stays() -> None:
    server = Server()
    for _ in range(2):
        assert told(server.ask(ask(PROMPT, TEXT[5:7], session="", **EIGHT))[0]) == (Status.RUNNING, 2, TEXT[5:8])
    assert len(server.engine.sessions) == 0
    assert server.verifier.pool.sessions() == ()


def test_logprobs_when_asked_for_and_again_when_asked_again() -> None:
    server = Server()
    assert server.ask(first(OTHER))[0].logprobs is None
    server.ask(first(logprobs=True))
    for _ in range(2):
        assert server.ask(ask([], TEXT[6:8], 6))[0].logprobs.tolist() == [-t for t in TEXT[6:9]]
    longer = ask(TEXT[6:11], [], 6)
    assert server.ask(longer)[0].logprobs.tolist() == [-TEXT[11]]
    assert server.ask(ask([], TEXT[6:8], 6))[0].logprobs.tolist() == [-t for t in TEXT[6:9]]


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (ask([], [], 6, seed=4), "parameter 'seed' is 4; allowed: 0, as in the first request"),
        (ask([], [], 6, eos_token_ids="3"), "parameter 'eos_token_ids' is 3; allowed: the default"),
        (ask([], [], 6, ttft_ms=30), "parameter 'tpot_ms' is 200.0; allowed: the default"),
        (ask([], [], 6, seed="x"), "parameter 'seed' is 'x'; allowed: a whole number"),
        (ask([], [], 3), "PREFIX_LEN and TOKENS make 3 tokens; allowed for this session: 5 to 13"),
        (ask([1] * 9, [], 6), "PREFIX_LEN and TOKENS make 15 tokens; allowed for this session: 5 to 13"),
        (ask(PROMPT, session=OTHER, max_new_tokens=99), "'max_new_tokens' is 99; allowed: a whole number from 1 to 55"),
    ],
)
def test_what_a_session_cannot_be_asked(request_: VerifyRequest, line: str) -> None:
    server = Server()
    server.ask(first())
    refused, good = server.ask(request_, ask([], TEXT[6:7], 6))
    assert isinstance(refused, InvalidRequest)
    assert line in str(refused)
    assert told(good) == (Status.RUNNING, 1, TEXT[6:8]), "it harms nobody else"


@pytest.mark.parametrize(
    "request_",
    [
        ask(PROMPT, max_new_tokens=8, ignore_eos=True, seed=4),  # other parameters
        ask(PROMPT),  # none: the defaults
        ask(PROMPT[:3]),  # less than the prompt that is held
        ask(TEXT[:7], max_new_tokens=8, ignore_eos=True),  # what was generated is the prompt now
        ask(TEXT[:10], TEXT[10:12], prompt_len=5, **EIGHT),  # more than is held
        ask(TEXT[:6], TEXT[6:8], prompt_len=5, **EIGHT),  # less than is held
        ask([*TEXT[:6], wrong(TEXT[6])], prompt_len=5, **EIGHT),  # something else than is held
        ask([wrong(PROMPT[0]), *PROMPT[1:]], **EIGHT),
        ask(TEXT[:12], prompt_len=11, max_new_tokens=1, logprobs=True),
        ask(TEXT[:7], prompt_len=5, max_new_tokens=8, eos_token_ids=str(TEXT[6])),
        ask(TEXT[:7], prompt_len=9),
        ask(PROMPT, max_new_tokens=99),
    ],
)
def test_a_request_with_all_tokens_is_answered_as_if_nothing_were_held(request_: VerifyRequest) -> None:
    def shown(answer: Any) -> Any:
        logprobs = getattr(answer, "logprobs", None)
        return str(answer) if isinstance(answer, InvalidRequest) else (*told(answer), str(logprobs))

    (expected,) = Server().ask(request_)
    server = Server()
    server.ask(first(seed=3), ask([], TEXT[6:8], 6))
    server.verifier.passes.clear()
    first_time, second_time = server.ask(request_, request_)
    assert shown(first_time) == shown(second_time) == shown(expected)
    refused = isinstance(expected, InvalidRequest)
    assert len(server.engine.sessions) == 1
    if refused:
        assert told(server.ask(ask([], [], 6, seed=3))[0]) == (Status.RUNNING, 0, TEXT[6:7]), "what is held stays"


def test_the_same_parameters_go_on_with_what_is_held() -> None:
    server = Server()
    server.ask(first(), ask([], TEXT[6:8], 6))
    num_passes = server.num_passes
    again = ask(TEXT[:6], TEXT[6:8], prompt_len=5, **EIGHT)
    assert told(server.ask(again)[0]) == (Status.RUNNING, 2, TEXT[6:9])
    assert server.num_passes == num_passes
    server.ask(ask(TEXT[:9], prompt_len=5, **EIGHT))
    assert [item.num_new_tokens for item in server.verifier.passes[-1]] == [1]


def test_a_session_goes_on_with_the_parameters_of_the_last_request_with_all_tokens() -> None:
    server = Server()
    server.ask(first(seed=3), first(seed=4))
    assert isinstance(server.ask(ask([], [], 6, seed=3))[0], InvalidRequest)
    assert told(server.ask(ask([], [], 6, seed=4))[0]) == (Status.RUNNING, 0, TEXT[6:7])


def test_parameters_may_be_repeated() -> None:
    server = Server()
    sampling = {"temperature": 0.5, "top_p": "0.9", "seed": 3, "ttft_ms": 900, "logprobs": True, "eos_token_ids": "6,3"}
    server.ask(first(**sampling))
    again = ask([], [], 6, **(EIGHT | sampling | {"temperature": "0.50"}))
    assert isinstance(server.ask(again)[0], VerifyAnswer)


# -- batches ----------------------------------------------------------------------------------------------------


def test_a_batch_is_one_pass() -> None:
    server = Server()
    prompts = [[i, 2, 3, 4] for i in range(6)]
    requests = [ask(prompt, session=session_id(i), **EIGHT) for i, prompt in enumerate(prompts)]
    answers = server.ask(*requests)
    assert [told(a)[2] for a in answers] == [target_alone(np.array(p), 5)[4:] for p in prompts]
    assert server.num_passes == 1


def test_a_session_takes_part_once_in_a_pass_and_in_order() -> None:
    server = Server()
    answers = server.ask(first(), ask([], TEXT[6:7], 6), ask([], TEXT[8:10], 8), first(OTHER))
    assert [told(answer)[2] for answer in answers] == [TEXT[5:6], TEXT[6:8], TEXT[8:11], TEXT[5:6]]
    assert sum(item.session == S for items in server.verifier.passes for item in items) == 3
    assert server.num_passes == 3


def test_long_prefills_come_in_chunks() -> None:
    server = Server(max_pass_tokens=8)
    prompt = [i % VOCAB_SIZE for i in range(30)]
    answers = server.ask(ask(prompt, **EIGHT), first(OTHER))
    assert told(answers[0])[2] == target_alone(np.array(prompt), 31)[30:]
    assert told(answers[1])[2] == TEXT[5:6]
    assert all(sum(item.num_new_tokens for item in items) <= 8 for items in server.verifier.passes)


def test_a_draft_beyond_the_budget_of_a_pass_is_verified_in_the_next() -> None:
    server = Server(max_pass_tokens=3)
    assert told(server.ask(ask(PROMPT, TEXT[5:11], **EIGHT))[0]) == (Status.RUNNING, 6, TEXT[5:12])
    assert server.num_passes > 3


def test_a_failing_pass_fails_the_batch_and_the_next_one_works() -> None:
    server = Server()
    server.ask(first(OTHER))
    server.ask(first())

    def fail() -> None:
        raise RuntimeError("out of memory")

    server.verifier._on_run = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        server.ask(ask([], [], 6))
    server.verifier._on_run = lambda: None
    assert server.ask(ask([], [], 6)) == [NEED_PREFIX]
    assert told(server.ask(ask([], [], 6, session=OTHER))[0]) == (Status.RUNNING, 0, TEXT[6:7])


# -- what is forgotten ------------------------------------------------------------------------------------------


def test_sessions_end_by_themselves() -> None:
    server = Server(linger_s=10.0)
    server.ask(first())
    server.clock.now_s += 9.0
    server.ask(first(OTHER))
    server.clock.now_s += 9.0
    server.ask(ask([], [], 6, session=OTHER))
    assert server.ask(ask([], [], 6)) == [NEED_PREFIX]
    assert len(server.engine.sessions) == 1


def test_the_least_recently_used_session_makes_room() -> None:
    server = Server(max_sessions=2)
    third = session_id(3)
    server.ask(first(S))
    server.ask(first(OTHER))
    server.ask(ask([], [], 6))
    server.ask(first(third))
    assert server.ask(ask([], [], 6, session=OTHER)) == [NEED_PREFIX]
    assert told(server.ask(ask([], [], 7))[0])[2] == TEXT[7:8]


def test_kv_makes_room_without_the_client_noticing() -> None:
    """Six blocks of four tokens: two sessions of ten tokens, not three."""
    server = Server(num_blocks=6, prefix_sharing=False)
    prompts = {session_id(i): [i, *range(1, 10)] for i in range(3)}
    prompts = {name: [t % VOCAB_SIZE for t in prompt] for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        server.ask(ask(prompt, session=name, **EIGHT))
    assert server.verifier.pool.sessions() == tuple(prompts)[1:]
    for name, prompt in prompts.items():
        assert told(server.ask(ask([], [], 11, session=name))[0])[2] == target_alone(np.array(prompt), 12)[11:]
    assert server.engine.telemetry.totals.evictions >= 3


def test_a_batch_that_does_not_fit_into_kv_is_served_in_turn() -> None:
    server = Server(num_blocks=6, prefix_sharing=False)
    prompts = [[(i + j) % VOCAB_SIZE for j in range(14)] for i in range(5)]
    answers = server.ask(*(ask(p, session=session_id(i), **EIGHT) for i, p in enumerate(prompts)))
    assert [told(a)[2] for a in answers] == [target_alone(np.array(p), 15)[14:] for p in prompts]
