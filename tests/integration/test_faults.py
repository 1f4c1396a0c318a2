"""Clients that vanish, servers that die, an engine that fails: nobody hangs, nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from bench.live import Drafting, run_session
from tests.integration.conftest import ServerFactory
from tests.integration.support import (
    GREEDY,
    SAMPLED,
    Judge,
    Session,
    prompts,
    raw_stream,
    running,
    session_tensor,
    thin_open,
    wait_until,
)
from tests.tiny_model import hf_folder
from triton_models.server_process import ServerProcess
from wisp_plugin.messages import Commit, Mode, Status

pytestmark = [pytest.mark.integration, pytest.mark.alone]
UNSCHEDULED_S = 1.0  # DESIGN.md section 6


class Witness:
    """A session that goes on beside the one under test and sees how many share its passes."""

    def __init__(self, server: str, num_tokens: int) -> None:
        self.seen: list[tuple[float, int]] = []  # (time, sessions in the pass) of every commit
        self._session = Session.make(server, thin_open(prompts()[1], num_tokens, SAMPLED), on_commit=self._note)
        self._thread = threading.Thread(target=self._session.run, name="witness")
        self._thread.start()

    def _note(self, commit: Commit) -> None:
        self.seen.append((time.monotonic(), commit.timing.num_sessions))

    def sees(self, num_sessions: int) -> bool:
        """True if its newest commit came from a pass of so many sessions."""
        return bool(self.seen) and self.seen[-1][1] == num_sessions

    def finish(self, judge: Judge) -> None:
        """Wait for its end; its text must be right."""
        self._thread.join(120.0)
        self._session.client.close()
        assert self._session.state.status is Status.LENGTH
        judge.check(prompts()[1], self._session.state.generated, SAMPLED)


def test_a_client_without_close_is_unscheduled_and_can_resume(server: ServerProcess, judge: Judge) -> None:
    num_tokens = 80
    witness = Witness(server.grpc_url, 64)
    gone = Session.make(server.grpc_url, thin_open(prompts()[0], num_tokens, SAMPLED))
    gone.run(4)
    wait_until(lambda: witness.sees(2), 5.0)
    gone.vanish()
    wait_until(lambda: witness.sees(1), UNSCHEDULED_S)
    time.sleep(0.5)
    assert witness.sees(1), "it was scheduled again without a client"
    known = len(gone.state.generated)

    with raw_stream(server.grpc_url) as stream:  # only a session that is still held can be in conflict
        tokens = session_tensor(gone.opened.session) | {"TOKENS": prompts()[0]}
        stream.send(tokens, op="open", protocol=1, max_new_tokens=num_tokens, seed=99)
        assert stream.commit().status is Status.CONFLICT

    commits: list[Commit] = []
    back = Session.make(server.grpc_url, gone.opened, on_commit=commits.append, state=gone.state)
    text = back.run()
    back.client.close()
    assert commits[0].start == len(prompts()[0]) + known, "the rest, and only the rest"
    assert len(commits) > num_tokens // 4, "most of the rest was not computed for nobody"
    assert len(text) == num_tokens
    judge.check(prompts()[0], text, SAMPLED)
    witness.finish(judge)


def test_a_killed_client_is_unscheduled_and_others_go_on(server: ServerProcess, judge: Judge) -> None:
    command = [sys.executable, "-m", "edge_runtime.cli", "generate", "Tell me a long story.", "--chat", "--no-draft"]
    command += ["--ignore-eos", "--max-new-tokens", "2000", "--server", server.grpc_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.read(8), "the client generates"
            witness = Witness(server.grpc_url, 48)
            wait_until(lambda: witness.sees(2), 10.0)
        finally:
            client.send_signal(signal.SIGKILL)
        wait_until(lambda: witness.sees(1), UNSCHEDULED_S)
    witness.finish(judge)
    assert [num for _, num in witness.seen[-5:]] == [1] * 5


def test_the_server_survives_clients_that_leave_in_mid_generation(server: ServerProcess) -> None:
    """Before the first commit, in the middle of a pass, with commits on their way."""
    for i in range(8):
        session = Session.make(server.grpc_url, thin_open(prompts()[i % 3], 100, SAMPLED))
        if i % 3:
            session.run(i % 3)
        else:
            session.transport.open(session.state.reopen())
        time.sleep(0.013 * i)
        session.vanish()
    assert server.is_ready()
    assert len(run_session(server.grpc_url, thin_open(prompts()[0], 2), Drafting()).tokens) == 2


def test_generation_survives_a_kill_9_of_the_server(
    make_own_server: ServerFactory, judge: Judge, drafting: Callable[..., Drafting]
) -> None:
    """Restarted on its ports, the server knows nothing; the clients bring all it has to know."""
    num_tokens = 72  # so many that the fastest session is not done when the slowest has begun
    server = make_own_server()
    server.start()
    server.wait_ready()
    cases = [(drafting("int8"), Mode.FREE), (drafting("int4", Mode.SYNC, 1), Mode.SYNC), (Drafting(), Mode.FREE)]
    sessions = [
        Session.make(server.grpc_url, thin_open(prompt, num_tokens, SAMPLED, mode), device)
        for (device, mode), prompt in zip(cases, prompts(), strict=True)
    ]
    threads = [threading.Thread(target=session.run) for session in sessions]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(len(session.state.generated) >= 4 for session in sessions), 60.0)
    server.kill()
    assert all(session.state.status is Status.RUNNING for session in sessions), "killed in mid-generation"
    server.start()
    server.wait_ready()
    for thread in threads:
        thread.join(120.0)
    for session, prompt in zip(sessions, prompts(), strict=True):
        session.client.close()
        assert session.state.stats.num_reopened >= 1
        assert session.state.status is Status.LENGTH
        assert len(session.state.generated) == num_tokens
        judge.check(prompt, session.state.generated, SAMPLED)


def test_a_full_server_says_so(make_own_server: ServerFactory) -> None:
    """Overload is a status with a time to come back, not an error; a place that becomes free is given away."""
    settings = {"max_sessions": 1, "target": str(hf_folder())}
    with running(make_own_server(settings)) as server, raw_stream(server.grpc_url) as stream:
        first = Session.make(server.grpc_url, thin_open(prompts()[0][:4] % 300, 1_500, GREEDY))
        first.run(1)
        opening = {"op": "open", "protocol": 1, "max_new_tokens": 2}
        stream.send(session_tensor("") | {"TOKENS": prompts()[1][:4] % 300}, **opening)
        refused = stream.commit()
        assert refused.status is Status.OVERLOADED
        assert refused.retry_after_ms is not None
        assert refused.retry_after_ms > 0
        first.client.close()
        stream.send(session_tensor("") | {"TOKENS": prompts()[1][:4] % 300}, **opening)
        parts = [stream.commit()]
        while parts[-1].status is Status.RUNNING:
            parts.append(stream.commit())
    assert parts[-1].status is Status.LENGTH
    assert len(np.concatenate([part.tokens for part in parts])) == 2
