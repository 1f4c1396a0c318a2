"""The way from a draft's send to its commit, less the pass and the wait for it: wire, Triton, queue, respond.

In `sync` mode every draft has exactly one commit, which says in TIMING_US how long the draft waited in the server for
its pass and how long the pass took; what is left of the time at the client is the path. Drafts are recorded: the
target's own tokens, so nothing is drafted here and every round is accepted whole.

What Triton itself costs is measured beside it: `bench/path_floor` is a model with the same wire and nothing behind it.

One session goes through the edge's own transport. Eight devices have eight processors of their own; to leave the two
cores of a test machine to the server, eight clients replay gRPC messages that were prepared before the clock starts.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bench.live import make_open
from edge_runtime.transport import VERIFIER_MODEL, GrpcStream
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Close, Commit, Draft, Mode, Open, Sampling, Status, Tokens
from wisp_plugin.wire import encode_request

FLOOR_REPOSITORY = Path(__file__).parent / "path_floor"
FLOOR_MODEL = "path_floor"
DRAFT_TOKENS = 3
COMMIT_LIMIT_S = 60.0
_DATATYPES = {"int32": "INT32", "uint8": "UINT8", "object": "BYTES"}


def replay(server: str, prompt: Tokens, truth: Tokens) -> list[float]:
    """Overhead in seconds of every round of one session, through the edge's transport."""
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
            path_s = time.monotonic() - sent_s - (commit.timing.waited_us + commit.timing.measured_us) / 1e6
            overheads_s.append(path_s)
    finally:
        stream.close()
    return overheads_s


def _receive(stream: GrpcStream) -> Commit:
    commit = stream.receive(COMMIT_LIMIT_S)
    if commit is None:
        raise TransportError(f"no commit within {COMMIT_LIMIT_S:g} s")
    return commit


def replay_many(
    server: str, prompt: Tokens, truth: Tokens, num_clients: int, model: str = VERIFIER_MODEL
) -> list[float]:
    """Overhead in seconds of every round of `num_clients` sessions at once, with prepared messages."""
    results: list[list[float]] = []

    def client() -> None:
        results.append(_replay_prepared(server, prompt, truth, model))

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(results) < num_clients:
        raise TransportError(f"only {len(results)} of {num_clients} replaying clients came to their end")
    return [overhead for result in results for overhead in result]


def _replay_prepared(server: str, prompt: Tokens, truth: Tokens, model: str) -> list[float]:
    opened = make_open(prompt, len(truth), Mode.SYNC, Sampling())
    tokens = np.concatenate([prompt, truth])
    # The prefill commits one token, every round the draft and one more.
    starts = range(len(prompt) + 1, len(tokens), DRAFT_TOKENS + 1)
    rounds = [_prepare(Draft(opened.session, at, at, tokens[at : at + DRAFT_TOKENS]), model) for at in starts]
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    overheads_s = []
    with grpc.insecure_channel(server, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        responses = stub.ModelStreamInfer(_drain(outbox), timeout=10 * COMMIT_LIMIT_S)
        outbox.put(_prepare(opened, model))
        next(responses)
        for message in rounds:
            sent_s = time.monotonic()
            outbox.put(message)
            response = next(responses)
            elapsed_s = time.monotonic() - sent_s
            overheads_s.append(elapsed_s - _in_server_s(response))
        outbox.put(_prepare(Close(opened.session), model))
        outbox.put(None)
        for _ in responses:
            pass
    return overheads_s


def _drain(outbox: queue.SimpleQueue[Any]) -> Iterator[Any]:
    while (message := outbox.get()) is not None:
        yield message


def _prepare(message: Open | Draft | Close, model: str) -> Any:
    """A message as tritonclient would send it."""
    parameters, tensors = encode_request(message)
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param"}.get(type(value), "string_param")
        setattr(request.parameters[name], kind, value)
    for name, array in tensors.items():
        request.inputs.add(name=name, datatype=_DATATYPES[array.dtype.name], shape=array.shape)
        is_text = array.dtype == np.object_
        request.raw_input_contents.append(
            len(array[0]).to_bytes(4, "little") + array[0] if is_text else array.tobytes()
        )
    return request


def _in_server_s(response: Any) -> float:
    """Wait and pass of a commit, in seconds."""
    if response.error_message:
        raise TransportError(response.error_message)
    infer = response.infer_response
    names = [output.name for output in infer.outputs]
    waited_us, _, measured_us, _ = np.frombuffer(infer.raw_output_contents[names.index("TIMING_US")], np.int64)
    return float(waited_us + measured_us) / 1e6
