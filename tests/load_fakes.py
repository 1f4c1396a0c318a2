"""A server for emulated devices that is not one: real gRPC on a free port, and what it answers is a test's to say."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from bench.load_wire import STREAM_METHOD
from tests.factories import make_commit
from triton_models.emulated_text import HashText
from wisp_plugin.messages import Commit, Status, Timing
from wisp_plugin.wire import encode_commit

LIMIT_S = 20.0  # of every wait
_SESSIONS = 16  # at the same time
_TIMING = Timing(measured_us=30_000, num_sessions=1)
_DATATYPES = {"int32": "INT32", "uint8": "UINT8", "int64": "INT64", "float32": "FP32"}


def response_of(commit: Commit) -> bytes:
    """A commit as Triton sends it."""
    stream = service_pb2.ModelStreamInferResponse()
    stream.infer_response.id = commit.session
    for name, array in encode_commit(commit).items():
        stream.infer_response.outputs.add(name=name, datatype=_DATATYPES[array.dtype.name], shape=array.shape)
        stream.infer_response.raw_output_contents.append(array.tobytes())
    data: bytes = stream.SerializeToString()
    return data


class AskedSession:
    """The server's side of one stream, whose client has sent its open. `number` counts streams from 0."""

    def __init__(self, requests: Iterator[bytes], context: grpc.ServicerContext, numbers: Iterator[int]) -> None:
        self._requests = requests
        self._has_ended = threading.Event()
        context.add_callback(self._has_ended.set)
        opened = self._next()
        self.number, self.id = next(numbers), str(opened.id)
        self._seed = opened.parameters["seed"].int64_param
        self.device = self._seed >> 20  # as `bench.workload` numbers sessions, in a run with seed 0
        self.position = self.start = int(opened.parameters["prompt_len"].int64_param)
        self.num_tokens = int(opened.parameters["max_new_tokens"].int64_param)

    def commit(self, num_tokens: int, status: Status = Status.RUNNING, wrong: int = 0) -> Commit:
        """The next tokens of its text, with `wrong` 1 all of them another."""
        start, self.position = self.position, self.position + num_tokens
        tokens = HashText().tokens(self._seed, start, self.position) ^ wrong
        return replace(make_commit(start, *tokens.tolist(), status=status, session=self.id), timing=_TIMING)

    def rest(self) -> Commit:
        """All that is left."""
        return self.commit(self.start + self.num_tokens - self.position, Status.LENGTH)

    def wait_close(self) -> None:
        """Until its client has asked to close it, or is gone."""
        with contextlib.suppress(StopIteration, grpc.RpcError):
            while self._next().parameters["op"].string_param != "close":
                pass

    def wait_end(self) -> None:
        """Until its client has let go of the stream."""
        self._has_ended.wait(LIMIT_S)

    def _next(self) -> Any:
        return service_pb2.ModelInferRequest.FromString(next(self._requests))


def answer(session: AskedSession) -> Iterator[Commit]:
    """What a good server does: half of the tokens, then the others."""
    yield session.commit(session.num_tokens // 2)
    yield session.rest()


@contextlib.contextmanager
def serving(script: Callable[[AskedSession], Iterator[Commit]] = answer) -> Iterator[str]:
    """HOST:PORT of a server that answers each stream as `script` says. Gone afterwards, with all of its streams."""
    numbers = itertools.count()

    def respond(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        return map(response_of, script(AskedSession(requests, context, numbers)))

    service, method = STREAM_METHOD.strip("/").split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(respond)}
    server = grpc.server(ThreadPoolExecutor(_SESSIONS))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        assert server.stop(0).wait(LIMIT_S), "a stream goes on"
