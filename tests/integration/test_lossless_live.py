"""The text is the target's own, whatever drafts, in which mode, and how many at once (DESIGN.md section 3)."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.live import Drafting, SessionResult, run_session, server_totals
from bench.lossless_rules import DRAFT, RULE_CASES
from tests.integration.conftest import ServerFactory
from tests.integration.support import (
    GREEDY,
    PENALIZED,
    SAMPLED,
    Judge,
    Session,
    prompts,
    raw_stream,
    run_together,
    running,
    session_tensor,
    thin_open,
)
from triton_models.server_process import ServerProcess
from wisp_plugin.acceptance_model import shipped_model
from wisp_plugin.edge_session import ACK_TOKENS
from wisp_plugin.home import default_target_dir
from wisp_plugin.messages import Commit, Mode, Origin, Sampling, Slo, Status

pytestmark = pytest.mark.integration
NUM_TOKENS = 16


def run_three(
    server: ServerProcess, drafting: Callable[..., Drafting], precision: str | None, mode: Mode, sampling: Sampling
) -> list[np.ndarray]:
    """Three sessions at once, one per prompt, each with a seed of its own; their generated tokens."""
    jobs = []
    for i, prompt in enumerate(prompts()):
        opened = thin_open(prompt, NUM_TOKENS, dataclasses.replace(sampling, seed=sampling.seed + i), mode)
        device = drafting(precision, mode, i) if precision else Drafting(mode=mode)
        jobs.append(lambda opened=opened, device=device: run_session(server.grpc_url, opened, device))
    return [result.tokens for result in run_together(jobs)]


@pytest.mark.parametrize(
    ("precision", "mode", "sampling"),
    [
        pytest.param("int8", Mode.FREE, GREEDY, id="int8-free-greedy"),
        pytest.param("int4", Mode.FREE, SAMPLED, id="int4-free-sampled"),
        pytest.param("int8", Mode.SYNC, SAMPLED, id="int8-sync-sampled"),
        pytest.param("int4", Mode.SYNC, GREEDY, id="int4-sync-greedy"),
        pytest.param("int4", Mode.FREE, PENALIZED, id="int4-free-penalized"),
        pytest.param(None, Mode.FREE, SAMPLED, id="thin-sampled"),
        pytest.param(None, Mode.SYNC, GREEDY, id="thin-sync-greedy"),
    ],
)
def test_three_sessions_at_once_give_the_targets_own_tokens(
    server: ServerProcess,
    judge: Judge,
    drafting: Callable[..., Drafting],
    precision: str | None,
    mode: Mode,
    sampling: Sampling,
) -> None:
    results = run_three(server, drafting, precision, mode, sampling)
    for i, (prompt, tokens) in enumerate(zip(prompts(), results, strict=True)):
        assert len(tokens) == NUM_TOKENS
        judge.check(prompt, tokens, dataclasses.replace(sampling, seed=sampling.seed + i))


@pytest.mark.parametrize("mode", [Mode.FREE, Mode.SYNC])
def test_every_rule_gives_the_targets_own_tokens(
    server: ServerProcess, judge: Judge, drafting: Callable[..., Drafting], mode: Mode
) -> None:
    """One short session per stop rule, three at once, every other one sampled with a seed of its own."""
    model, cases = shipped_model(DRAFT), RULE_CASES[mode]
    samplings = [dataclasses.replace(SAMPLED, seed=i) if i % 2 else GREEDY for i in range(len(cases))]

    def run(number: int) -> SessionResult:
        controller = functools.partial(cases[number].controller, mode, model)
        device = dataclasses.replace(drafting(DRAFT, mode, number % 3), make_controller=controller)
        opened = thin_open(prompts()[number % 3], NUM_TOKENS, samplings[number], mode)
        return run_session(server.grpc_url, opened, device)

    for first in range(0, len(cases), 3):
        numbers = range(first, min(first + 3, len(cases)))
        results = run_together([functools.partial(run, number) for number in numbers])
        for number, result in zip(numbers, results, strict=True):
            assert len(result.tokens) == NUM_TOKENS, cases[number].name
            judge.check(prompts()[number % 3], result.tokens, samplings[number])
            assert mode is Mode.FREE or result.stats.num_sent > 0, cases[number].name


def test_the_judge_sees_a_wrong_token(judge: Judge) -> None:
    """Every check of this folder rests on it: a token that the target would not choose must fail."""
    prompt = prompts()[0]
    first = int(judge.logits(np.append(prompt, np.int32(0)), 1)[0].argmax())
    judge.check(prompt, np.array([first], np.int32), GREEDY)
    with pytest.raises(AssertionError, match="the target's own is"):
        judge.check(prompt, np.array([first + 1], np.int32), GREEDY)


def test_drafts_are_accepted(server: ServerProcess, drafting: Callable[..., Drafting]) -> None:
    """Equality alone would also hold if every draft were dropped. In sync mode none can be late."""
    session = Session.make(
        server.grpc_url, thin_open(prompts()[0], NUM_TOKENS, SAMPLED, Mode.SYNC), drafting("int8", Mode.SYNC)
    )
    session.run()
    session.client.close()
    assert session.state.stats.num_accepted >= NUM_TOKENS // 2
    assert session.state.stats.tokens_per_pass > 1.5


def test_an_eos_ends_the_session_where_the_target_ends(server: ServerProcess, judge: Judge) -> None:
    """Any token can be named the end: here the fourth of the greedy text, met inside an accepted draft or not."""
    prompt = prompts()[0]
    free = run_session(server.grpc_url, thin_open(prompt, NUM_TOKENS), Drafting()).tokens
    eos = int(free[3])
    opened = dataclasses.replace(thin_open(prompt, NUM_TOKENS), eos_token_ids=(eos,))
    session = Session.make(server.grpc_url, opened)
    tokens = session.run()
    session.client.close()
    assert session.state.status is Status.EOS
    assert tokens.tolist() == free[: free.tolist().index(eos) + 1].tolist()


def test_logprobs_are_those_of_the_chosen_tokens(
    server: ServerProcess, judge: Judge, drafting: Callable[..., Drafting]
) -> None:
    commits: list[Commit] = []
    opened = dataclasses.replace(thin_open(prompts()[1], NUM_TOKENS, SAMPLED), logprobs=True)
    run_session(server.grpc_url, opened, drafting("int8"), on_commit=commits.append)
    tokens = np.concatenate([commit.tokens for commit in commits])
    given = [commit.logprobs for commit in commits if commit.logprobs is not None]
    assert len(given) == len(commits)
    np.testing.assert_allclose(np.concatenate(given), judge.logprobs(prompts()[1], tokens), atol=1e-3)


def test_logprobs_come_only_when_asked_for(server: ServerProcess) -> None:
    commits: list[Commit] = []
    run_session(server.grpc_url, thin_open(prompts()[0], 3), Drafting(), on_commit=commits.append)
    assert [commit.logprobs for commit in commits] == [None] * len(commits)


def test_the_server_draws_a_session_when_it_is_empty(server: ServerProcess, judge: Judge) -> None:
    """Fixed data, as of perf_analyzer, can open many sessions; the drawn capability works for what follows."""
    drawn = []
    for _ in range(2):
        with raw_stream(server.grpc_url) as stream:
            stream.send(
                session_tensor("") | {"TOKENS": prompts()[0]},
                op="open", protocol=1, max_new_tokens=ACK_TOKENS, ignore_eos=True,
            )  # fmt: skip
            first = stream.commit()
            stream.send(session_tensor(first.session), op="close")
            commits = [first]
            while commits[-1].status is Status.RUNNING:
                commits.append(stream.commit())
            assert commits[-1].status is Status.CLOSED
            judge.check(prompts()[0], np.concatenate([commit.tokens for commit in commits]), GREEDY)
            drawn.append({commit.session for commit in commits})
    assert len(drawn[0] | drawn[1]) == 2, "each session keeps one capability, and it is its own"


def test_evicted_sessions_go_on_with_the_right_tokens(make_own_server: ServerFactory, judge: Judge) -> None:
    """12 blocks of 32 tokens hold three sessions of 120 tokens, but not of 129: one of them loses its KV."""
    texts = [np.tile(prompt, 10)[:120] for prompt in prompts()]
    with running(make_own_server({"kv_tokens": 384, "kv_block_tokens": 32})) as server:
        # An SLO that is met anywhere: a session that is refused, and comes when the others have ended, evicts none.
        slo = Slo(ttft_ms=60_000.0, tpot_ms=5_000.0)
        opens = [dataclasses.replace(thin_open(text, NUM_TOKENS, SAMPLED), slo=slo) for text in texts]
        results = run_together([lambda o=opened: run_session(server.grpc_url, o, Drafting()) for opened in opens])
        assert server_totals(server)["evictions"] >= 1
    for text, result in zip(texts, results, strict=True):
        assert len(result.tokens) == NUM_TOKENS
        judge.check(text, result.tokens, SAMPLED)


def test_origins_tell_where_tokens_came_from(server: ServerProcess, drafting: Callable[..., Drafting]) -> None:
    commits: list[Commit] = []
    opened = thin_open(prompts()[2], NUM_TOKENS, GREEDY, Mode.SYNC)
    run_session(server.grpc_url, opened, drafting("int4", Mode.SYNC), on_commit=commits.append)
    assert commits[0].origin.tolist() == [Origin.DECODED], "the prefill commits the first token"
    for commit in commits[1:]:
        assert set(commit.origin[:-1].tolist()) <= {Origin.ACCEPTED}
        assert commit.timing.num_sessions == 1
        assert commit.timing.measured_us > 0
    assert commits[-1].status is Status.LENGTH


def shallow_target(folder: Path) -> Path:
    """The first two layers of the default target: a quick draft model that is seldom right."""
    source = default_target_dir()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    for path in source.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def test_a_draft_model_on_the_server_changes_no_token(
    make_own_server: ServerFactory, judge: Judge, drafting: Callable[..., Drafting], tmp_path: Path
) -> None:
    """For thin clients, and behind what a device has drafted. (That right drafts save passes: `test_server_draft`.)"""
    settings = {"server_draft": str(shallow_target(tmp_path / "draft")), "server_draft_kv_tokens": 4_096}
    with running(make_own_server(settings)) as server:
        for precision, sampling in ((None, GREEDY), (None, SAMPLED), ("int4", SAMPLED)):
            results = run_three(server, drafting, precision, Mode.FREE, sampling)
            for i, (prompt, tokens) in enumerate(zip(prompts(), results, strict=True)):
                assert len(tokens) == NUM_TOKENS
                judge.check(prompt, tokens, dataclasses.replace(sampling, seed=sampling.seed + i))
        totals = server_totals(server)
        assert totals["server_drafted_tokens"] > 0
        assert totals["server_accepted_tokens"] <= totals["server_drafted_tokens"]
