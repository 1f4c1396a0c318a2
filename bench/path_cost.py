"""The way from a draft's send to its commit, less the pass and the wait for it: wire, Triton, queue, respond.

Replaying clients send drafts that were recorded before (the target's own tokens), so nothing is computed on their
side. In `sync` mode every draft has exactly one commit, which says in TIMING_US how long the draft waited in the
server for its pass and how long the pass took; what is left is the path.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from bench.live import make_open
from edge_runtime.transport import GrpcStream
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Commit, Draft, Mode, Sampling, Status, Tokens

DRAFT_TOKENS = 3
COMMIT_LIMIT_S = 60.0


def replay(server: str, prompt: Tokens, truth: Tokens) -> list[float]:
    """Overhead in seconds of every round of one session whose drafts are `truth`, the target's own tokens."""
    opened = make_open(prompt, len(truth), Mode.SYNC, Sampling())
    tokens = np.concatenate([prompt, truth])
    stream = GrpcStream(server)
    overheads_s = []
    try:
        stream.open(opened)
        commit = _receive(stream)
        while commit.status is Status.RUNNING:
            position = commit.end
            draft = Draft(opened.session, position, position, tokens[position : position + DRAFT_TOKENS])
            sent_s = time.monotonic()
            stream.send(draft)
            commit = _receive(stream)
            elapsed_s = time.monotonic() - sent_s
            overheads_s.append(elapsed_s - (commit.timing.waited_us + commit.timing.measured_us) / 1e6)
    finally:
        stream.close()
    return overheads_s


def replay_many(server: str, prompt: Tokens, truth: Tokens, num_clients: int) -> list[float]:
    """`replay` by several clients at once."""
    results: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda: results.append(replay(server, prompt, truth))) for _ in range(num_clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(results) < num_clients:
        raise TransportError(f"only {len(results)} of {num_clients} replaying clients came to their end")
    return [overhead for result in results for overhead in result]


def _receive(stream: GrpcStream) -> Commit:
    commit = stream.receive(COMMIT_LIMIT_S)
    if commit is None:
        raise TransportError(f"no commit within {COMMIT_LIMIT_S:g} s")
    return commit
