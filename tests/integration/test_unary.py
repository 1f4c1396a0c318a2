"""`wisp_verifier_batched`: unary requests over gRPC and HTTP give the target's own text, batched or not.

One round over HTTP/REST, as anybody can try it ("The capital of France is", with " Paris." as its draft):

    curl -s localhost:8000/v2/models/wisp_verifier_batched/infer -d '{"inputs": [
      {"name": "TOKENS", "datatype": "INT32", "shape": [1, 5], "data": [504, 3575, 282, 4649, 314]},
      {"name": "DRAFT", "datatype": "INT32", "shape": [1, 2], "data": [7042, 30]}]}'
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from bench.live import Drafting, run_session, server_totals
from edge_runtime.client import EdgeClient
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.transport import as_input
from edge_runtime.unary_transport import UNARY_MODEL, UnaryTransport
from tests.integration.support import GREEDY, SAMPLED, Judge, prompts, run_together, thin_open, wait_until
from triton_models.server_process import ServerProcess
from wisp_plugin.home import default_draft_dir
from wisp_plugin.messages import Mode, Status
from wisp_plugin.unary_wire import VerifyAnswer, VerifyRequest, decode_answer, encode_verify
from wisp_plugin.wire import new_session_id

pytestmark = pytest.mark.integration
NUM_TOKENS = 16
FRANCE = [504, 3575, 282, 4649, 314]


@pytest.fixture
def server(unary_server: ServerProcess) -> Iterator[ServerProcess]:
    """The unary server, which must be alive before and after the test."""
    assert unary_server.is_ready()
    yield unary_server
    assert unary_server.is_ready()


class RawClient:
    """Unary requests without our client: `ask` one, or send many at once."""

    def __init__(self, server: ServerProcess) -> None:
        self._client = triton.InferenceServerClient(server.grpc_url)

    def ask(self, *requests: VerifyRequest) -> list[VerifyAnswer]:
        """Send all at once and wait for all answers."""
        answers: list[Any] = [None] * len(requests)
        done = threading.Semaphore(0)

        def take(at: int, result: Any, error: Any) -> None:
            answers[at] = error or result
            done.release()

        for at, request in enumerate(requests):
            parameters, tensors = encode_verify(request)
            inputs = [as_input(name, array) for name, array in tensors.items()]
            self._client.async_infer(UNARY_MODEL, inputs, functools.partial(take, at), parameters=parameters)
        for _ in requests:
            assert done.acquire(timeout=30.0)
        assert not [answer for answer in answers if isinstance(answer, Exception)]
        names = ("NUM_ACCEPTED", "NEXT_TOKENS", "STATUS")
        return [decode_answer({name: answer.as_numpy(name) for name in names}) for answer in answers]

    def num_batches(self) -> tuple[int, int]:
        """Requests that Triton has handed over so far, and in how many batches."""
        stats = self._client.get_inference_statistics(UNARY_MODEL).model_stats[0]
        return stats.inference_count, stats.execution_count


def post(server: ServerProcess, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON answer of one infer request."""
    url = f"http://{server.http_url}/v2/models/{UNARY_MODEL}/infer"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=30.0) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ints(name: str, *numbers: int) -> dict[str, Any]:
    """A JSON input."""
    return {"name": name, "datatype": "INT32", "shape": [1, len(numbers)], "data": list(numbers)}


def outputs(answer: dict[str, Any]) -> dict[str, list[Any]]:
    """Data of the outputs of a JSON answer."""
    return {output["name"]: output["data"] for output in answer["outputs"]}


# -- our client -------------------------------------------------------------------------------------------------


def test_three_sessions_at_once_give_the_targets_own_tokens(
    server: ServerProcess, judge: Judge, drafting: Callable[..., Drafting]
) -> None:
    opens = [
        thin_open(prompt, NUM_TOKENS, dataclasses.replace(SAMPLED, seed=i), Mode.SYNC)
        for i, prompt in enumerate(prompts())
    ]
    jobs = [
        functools.partial(run_session, server.grpc_url, o, drafting("int4", Mode.SYNC, i), connect=UnaryTransport)
        for i, o in enumerate(opens)
    ]
    results = run_together(jobs)
    for opened, result in zip(opens, results, strict=True):
        assert len(result.tokens) == NUM_TOKENS
        judge.check(opened.tokens, result.tokens, opened.sampling)
    assert sum(result.stats.num_accepted for result in results) >= NUM_TOKENS // 2


def test_wisp_edge_gives_the_targets_text(server: ServerProcess, judge: Judge) -> None:
    command = [sys.executable, "-m", "edge_runtime.cli", "generate", "Name three colours.", "--chat"]
    options = ["--max-new-tokens", "24", "--server", server.grpc_url, "--transport", "unary", "--stop", "nowhere"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60.0, check=True)
    tokenizer = Tokenizer.load(default_draft_dir("int8"))
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Name three colours."}])
    generated = tokenizer.encode(result.stdout.removesuffix("\n"), add_special_tokens=False)
    assert len(generated) >= 8
    judge.check(prompt, generated, GREEDY)


def test_a_session_that_the_server_has_forgotten_goes_on(server: ServerProcess, judge: Judge) -> None:
    opened = thin_open(prompts()[0], NUM_TOKENS, SAMPLED, Mode.SYNC)
    drafting = Drafting(mode=Mode.SYNC)
    state = drafting.session(opened)
    client = EdgeClient(opened, state, UnaryTransport(server.grpc_url))
    tokens = client.run()
    for _ in range(5):
        next(tokens)
    raw = RawClient(server)
    for i in range(4):  # as many as the server remembers
        raw.ask(VerifyRequest(new_session_id(), 0, np.array([1, 2, i], np.int32)))
    (answer,) = raw.ask(VerifyRequest(opened.session, len(opened.tokens), np.empty(0, np.int32)))
    assert answer.status is Status.NEED_PREFIX
    list(tokens)
    client.close()
    assert state.stats.num_reopened == 0, "the session has not noticed"
    assert len(state.generated) == NUM_TOKENS
    judge.check(opened.tokens, state.generated, SAMPLED)


def test_sessions_whose_kv_is_evicted_go_on(server: ServerProcess, judge: Judge) -> None:
    """12 blocks of 32 tokens hold three sessions of 126 tokens, but not of 129."""
    before = server_totals(server)["evictions"]
    texts = [np.tile(prompt, 10)[:126] for prompt in prompts()]
    opens = [thin_open(text, 5, SAMPLED, Mode.SYNC) for text in texts]
    drafting = Drafting(mode=Mode.SYNC)
    jobs = [functools.partial(run_session, server.grpc_url, o, drafting, connect=UnaryTransport) for o in opens]
    for text, result in zip(texts, run_together(jobs), strict=True):
        assert len(result.tokens) == 5
        judge.check(text, result.tokens, SAMPLED)
    assert server_totals(server)["evictions"] > before


# -- batches ----------------------------------------------------------------------------------------------------


def test_ragged_requests_come_in_one_batch_and_a_session_twice_too(server: ServerProcess, judge: Judge) -> None:
    """While the instance works on a long prompt, others gather: of different lengths, and two of the same session."""
    raw, name = RawClient(server), new_session_id()
    opened = thin_open(prompts()[1], 8, mode=Mode.SYNC)
    text = run_session(server.grpc_url, opened, Drafting(mode=Mode.SYNC), connect=UnaryTransport).tokens
    num_prompt = len(prompts()[1])
    (first,) = raw.ask(VerifyRequest(name, 0, prompts()[1], parameters={"max_new_tokens": 8}))
    assert first.tokens.tolist() == text[:1].tolist()
    before = raw.num_batches()
    nothing = np.empty(0, np.int32)
    busy, *answers = raw.ask(
        VerifyRequest("", 0, np.tile(prompts()[0], 10)[:300]),
        VerifyRequest(name, num_prompt + 1, nothing, text[1:4]),
        VerifyRequest(name, num_prompt + 1, nothing, text[1:4]),
        VerifyRequest(name, num_prompt + 5, nothing, text[5:6]),
        *(VerifyRequest("", 0, np.arange(5 + i, dtype=np.int32)) for i in range(3)),
    )
    wait_until(lambda: raw.num_batches()[0] >= before[0] + 7, 5.0)  # Triton counts a request behind its answer
    num_requests, num_batches = np.subtract(raw.num_batches(), before)
    assert num_batches < num_requests
    assert len(busy.tokens) == 1
    assert [answer.num_accepted for answer in answers[:3]] == [3, 3, 1]
    assert [answer.tokens.tolist() for answer in answers[:3]] == [text[1:5].tolist()] * 2 + [text[5:7].tolist()]


# -- HTTP -------------------------------------------------------------------------------------------------------


def test_one_round_over_http_as_printed(server: ServerProcess, judge: Judge) -> None:
    """The command in this module's docstring, word for word but for the port."""
    (command,) = re.findall(r"curl -s .*?'\n", str(__doc__), re.DOTALL)
    body = json.loads(command.split("'")[1])
    status, answer = post(server, body)
    assert status == 200
    found = outputs(answer)
    judge.check(np.array(FRANCE, np.int32), np.array(found["NEXT_TOKENS"], np.int32), GREEDY)
    assert (found["NUM_ACCEPTED"][0] >= 1, found["STATUS"]) == (True, [0])
    assert found["NEXT_TOKENS"][0] == 7042
    if shutil.which("curl"):
        line = command.replace("localhost:8000", server.http_url)
        printed = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=30.0, check=True).stdout
        assert outputs(json.loads(printed)) == found


def test_a_session_over_http(server: ServerProcess, judge: Judge) -> None:
    name = {"name": "SESSION", "datatype": "BYTES", "shape": [1, 1], "data": [new_session_id()]}
    sampling = {"seed": SAMPLED.seed, "temperature": "0.8", "top_p": 0.95, "max_new_tokens": 6, "ignore_eos": True}
    tokens = list(FRANCE)
    status, answer = post(server, {"inputs": [name, ints("TOKENS", *FRANCE)], "parameters": sampling})
    while True:
        assert status == 200, answer
        tokens += outputs(answer)["NEXT_TOKENS"]
        if outputs(answer)["STATUS"] != [0]:
            break
        body = {"inputs": [name, ints("PREFIX_LEN", len(tokens)), ints("TOKENS"), ints("DRAFT", 7042, 30)]}
        status, answer = post(server, body)
    assert outputs(answer)["STATUS"] == [Status.LENGTH]
    assert len(tokens) == len(FRANCE) + 6
    judge.check(np.array(FRANCE, np.int32), np.array(tokens[len(FRANCE) :], np.int32), SAMPLED)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"inputs": [ints("TOKENS", 49_152)]}, "token id 49152 at 0; allowed: 0 to 49151"),
        ({"inputs": [ints("TOKENS")]}, "tensor 'TOKENS' is empty; with PREFIX_LEN 0 it needs"),
        ({"inputs": [ints("TOKENS", 1), ints("PREFIX_LEN", 3)]}, "PREFIX_LEN is 3 without SESSION; allowed: 0"),
        ({"inputs": [ints("TOKENS", *[1] * 385)]}, "make 385 tokens; allowed: 384"),
        ({"inputs": [ints("TOKENS", 1)], "parameters": {"tempreture": 1}}, "unknown parameter 'tempreture'; allowed:"),
        ({"inputs": [ints("TOKENS", 1)], "parameters": {"top_p": 2}}, "'top_p' is 2; allowed: a number from"),
        ({"inputs": [ints("TOKENS", 1) | {"shape": [1]}]}, "shape"),
        ({"inputs": [ints("DRAFT", 1)]}, "TOKENS"),
        ({"inputs": [{"name": "TOKENS", "datatype": "INT32", "shape": [2, 1], "data": [1, 2]}]}, "allowed: [1, n]"),
    ],
)
def test_what_is_malformed_is_one_line(server: ServerProcess, body: dict[str, Any], line: str) -> None:
    status, answer = post(server, body)
    assert status == 400
    assert line in answer["error"]
    assert "\n" not in answer["error"]
    assert post(server, {"inputs": [ints("TOKENS", *FRANCE)]})[0] == 200
