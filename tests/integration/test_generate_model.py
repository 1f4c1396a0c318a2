"""`wisp_generate` as thin clients meet it: curl, tritonclient, the target's own text, and no session left behind."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from edge_runtime.tokenizer import Tokenizer
from tests.integration.conftest import ServerFactory
from tests.integration.support import TRITON_DTYPES, Judge, Session, running, thin_open, wait_until
from triton_models.server_process import ServerProcess
from wisp_plugin.home import default_draft_dir
from wisp_plugin.messages import Sampling

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The capital of France is"
COPY = "Paris, Lyon, Nice, Paris, Lyon, Nice, Paris, Lyon,"
NUM_TOKENS = 12
LIMIT_S = 30.0
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
_GAUGE = re.compile(r'^wisp_sessions\{state="(?:running|waiting)"\} ([0-9.]+)$', re.MULTILINE)
_ACCEPTED = re.compile(r"^wisp_accepted_tokens_total ([0-9.e+]+)$", re.MULTILINE)


def url(server: ServerProcess, endpoint: str) -> str:
    return f"http://{server.http_url}/v2/models/wisp_generate/{endpoint}"


def generate(server: ServerProcess, text: str = PROMPT, **fields: Any) -> dict[str, Any]:
    """The answer of /generate; without the prompt in it unless asked for."""
    body = {"text_input": text, "max_tokens": NUM_TOKENS, "exclude_input_in_output": True} | fields
    with urllib.request.urlopen(url(server, "generate"), json.dumps(body).encode(), timeout=LIMIT_S) as answer:
        return dict(json.load(answer))


def stream(server: ServerProcess, text: str = PROMPT, **fields: Any) -> list[dict[str, Any]]:
    """The events of /generate_stream."""
    body = {"text_input": text, "max_tokens": NUM_TOKENS, "stream": True} | fields
    with urllib.request.urlopen(url(server, "generate_stream"), json.dumps(body).encode(), timeout=LIMIT_S) as answer:
        return [json.loads(line[5:]) for line in answer if line.startswith(b"data:")]


def refusal(server: ServerProcess, **fields: Any) -> tuple[int, str]:
    """HTTP status and error of a request that is refused."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        generate(server, **fields)
    message = str(json.load(caught.value)["error"])
    assert "\n" not in message
    return caught.value.code, message


def metrics(server: ServerProcess) -> str:
    with urllib.request.urlopen(server.metrics_url, timeout=5.0) as page:
        return str(page.read().decode())


def num_sessions(server: ServerProcess) -> float:
    """Sessions that the verifier serves."""
    return sum(map(float, _GAUGE.findall(metrics(server))))


def curl(server: ServerProcess, endpoint: str, body: str) -> str:
    """What `curl` prints."""
    command = ["curl", "-sN", url(server, endpoint), "-d", body]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout


def test_curl_as_the_readme_has_it(server: ServerProcess) -> None:
    answer = json.loads(curl(server, "generate", '{"text_input": "The capital of France is", "max_tokens": 16}'))
    assert answer["text_output"].startswith("The capital of France is Paris.")
    assert answer["finish_reason"] == "length"
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (5, 16)
    body = '{"text_input": "The capital of France is", "max_tokens": 16, "stream": true}'
    lines = curl(server, "generate_stream", body).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert len(events) > 3
    assert PROMPT + "".join(event["text_output"] for event in events) == answer["text_output"]
    assert [event.get("finish_reason") for event in events] == [None] * (len(events) - 1) + ["length"]


def test_one_seed_gives_one_text_whoever_generates_it(server: ServerProcess, judge: Judge) -> None:
    """Here, by `wisp-edge` with drafts, and by transformers alone, which judges the tokens of a bare session."""
    tokenizer = Tokenizer.load(default_draft_dir("int8"))
    prompt = tokenizer.encode(PROMPT)
    for sampling in ({}, SAMPLED):
        tokens = Session.make(server.grpc_url, thin_open(prompt, NUM_TOKENS, Sampling(**sampling))).run()
        judge.check(prompt, tokens, Sampling(**sampling))
        expected = tokenizer.decode(tokens)
        assert generate(server, ignore_eos=True, **sampling)["text_output"] == expected
    in_json = generate(server, lookup="off", sampling_parameters=json.dumps(SAMPLED | {"ignore_eos": True}))
    assert in_json["text_output"] == expected
    options = [word for name, value in SAMPLED.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "edge_runtime.cli", "generate", PROMPT, "--server", server.grpc_url]
    command += ["--max-new-tokens", str(NUM_TOKENS), "--ignore-eos", *options]
    edge = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=True, cwd=ROOT)
    assert edge.stdout == expected + "\n"


def test_a_drawn_seed_is_told_and_gives_the_text_again(server: ServerProcess) -> None:
    first = generate(server, temperature=1.5, max_tokens=8)
    assert 0 <= first["seed"] < 2**63
    assert generate(server, temperature=1.5, seed=first["seed"], max_tokens=8)["text_output"] == first["text_output"]
    assert generate(server, temperature=1.5, max_tokens=1)["seed"] != first["seed"]


def test_a_text_that_repeats_itself_is_drafted(server: ServerProcess) -> None:
    def num_accepted() -> float:
        (number,) = _ACCEPTED.findall(metrics(server))
        return float(number)

    wait_until(lambda: num_sessions(server) == 0, 10.0)  # and all that was counted is published
    before = num_accepted()
    plain = generate(server, COPY, lookup="off")
    assert num_accepted() == before
    assert generate(server, COPY)["text_output"] == plain["text_output"]
    wait_until(lambda: num_accepted() >= before + 8, 5.0)


def test_chat_is_the_models_template(server: ServerProcess) -> None:
    question = "Name three colours."
    prompt = Tokenizer.load(default_draft_dir("int8")).chat_prompt([{"role": "user", "content": question}])
    assert generate(server, question, chat=True)["text_output"] == generate(server, prompt)["text_output"]


def test_characters_are_whole_and_stop_strings_span_tokens(server: ServerProcess) -> None:
    text = "🙂🙃🙂🙃🙂🙃🙂🙃🙂🙃"
    whole = generate(server, text)
    events = stream(server, text)
    pieces = [event["text_output"] for event in events]
    assert "".join(pieces) == whole["text_output"]
    assert len(pieces) < whole["num_output_tokens"]  # characters of several tokens
    assert sum(len(piece.encode()) > len(piece) for piece in pieces) > 2
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    plain = generate(server)
    assert plain["text_output"].startswith(" Paris.\n\nThe")
    stop = plain["text_output"][3:9]  # "is.\n\nT": the end of a token, whole ones, and the beginning of another
    cut = generate(server, stop=["never", stop])
    assert cut["text_output"] == plain["text_output"][:3]
    assert cut["finish_reason"] == "stop"
    assert cut["num_output_tokens"] < plain["num_output_tokens"]
    assert "".join(event["text_output"] for event in stream(server, stop=stop)) == cut["text_output"]


def test_what_cannot_be_is_one_line(server: ServerProcess) -> None:
    for fields, message in (
        ({"text": ""}, "tensor 'text_input' is empty; a prompt needs at least one token"),
        ({"max_tokens": 0}, "parameter 'max_tokens' is 0; allowed: a whole number from 1"),
        ({"max_tokens": 2_000_000}, "parameter 'max_new_tokens' is 2000000; allowed: a whole number from 1 to "),
        ({"top_p": 2}, "parameter 'top_p' is 2.0; allowed: "),
        ({"slo": "unheard-of"}, "parameter 'slo' is 'unheard-of'; "),
        ({"beams": 4}, "unknown parameter 'beams'; allowed: "),
    ):
        code, error = refusal(server, **fields)
        assert (code, error[: len(message)]) == (400, message)


class GrpcClient:
    """tritonclient's stream, and its answers."""

    def __init__(self, server: ServerProcess) -> None:
        import queue

        self.answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        self.client.start_stream(callback=lambda result, error: self.answers.put((result, error)))

    def ask(self, text: str, parameters: dict[str, Any] | None = None, **tensors: Any) -> None:
        named = {"text_input": np.array([text.encode()], np.object_)} | tensors
        inputs = []
        for name, array in named.items():
            kind = "BOOL" if array.dtype == np.bool_ else TRITON_DTYPES[array.dtype.name]
            tensor = tritonclient.grpc.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        self.client.async_stream_infer("wisp_generate", inputs, parameters=parameters)

    def texts(self) -> Iterator[str]:
        """Pieces of text up to the last response of a request."""
        while True:
            result, error = self.answers.get(timeout=LIMIT_S)
            assert error is None, error
            yield result.as_numpy("text_output")[0].decode()
            if result.as_numpy("finish_reason") is not None:
                return


def test_tritonclient_over_grpc(server: ServerProcess) -> None:
    expected = generate(server, **SAMPLED)["text_output"]
    client = GrpcClient(server)
    tensors = {
        "max_tokens": np.array([NUM_TOKENS], np.int32), "temperature": np.array([0.8], np.float32),
        "top_p": np.array([0.95], np.float32), "seed": np.array([7], np.int64), "stream": np.array([True]),
    }  # fmt: skip
    client.ask(PROMPT, **tensors)
    pieces = list(client.texts())
    assert len(pieces) > 3
    assert "".join(pieces) == expected
    client.ask(PROMPT, {"max_tokens": NUM_TOKENS, "temperature": "0.8", "top_p": "0.95", "seed": 7})
    assert list(client.texts()) == [PROMPT + expected]
    client.ask(PROMPT, {"beams": 4})
    _, error = client.answers.get(timeout=LIMIT_S)
    assert error.message().startswith("unknown parameter 'beams'; allowed: ")
    client.client.stop_stream()


def test_tritonclient_over_http(server: ServerProcess) -> None:
    """Its `infer` is not for decoupled models, as Triton says itself; for HTTP there is the generate endpoint."""
    client = tritonclient.http.InferenceServerClient(server.http_url)
    assert client.is_model_ready("wisp_generate")
    config = client.get_model_config("wisp_generate")
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert [output["name"] for output in config["output"]][:2] == ["text_output", "finish_reason"]
    text = tritonclient.http.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"Hi"], np.object_))
    with pytest.raises(tritonclient.http.InferenceServerException, match="decoupled"):
        client.infer("wisp_generate", [text])
    client.close()


def test_sixteen_at_once(server: ServerProcess) -> None:
    prompts = [f"{PROMPT} {i}" for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda p: generate(server, p, max_tokens=8, temperature=0.9, seed=3), prompts))
    assert [answer["num_output_tokens"] for answer in got] == [8] * 16
    for i in (0, 15):
        assert generate(server, prompts[i], max_tokens=8, temperature=0.9, seed=3) == got[i]


def test_clients_that_hang_up_leave_no_session(server: ServerProcess) -> None:
    wait_until(lambda: num_sessions(server) == 0, 10.0)
    connection = http.client.HTTPConnection(server.http_url, timeout=LIMIT_S)
    body = {"text_input": PROMPT, "max_tokens": 2000, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v2/models/wisp_generate/generate_stream", json.dumps(body))
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data:")
    client = GrpcClient(server)
    client.ask(PROMPT, {"max_tokens": 2000, "ignore_eos": True}, stream=np.array([True]))
    next(client.texts())
    wait_until(lambda: num_sessions(server) == 2, 5.0)
    answer.close()
    connection.close()
    client.client.stop_stream(cancel_requests=True)
    wait_until(lambda: num_sessions(server) == 0, 5.0)
    assert generate(server)["num_output_tokens"] == NUM_TOKENS


def test_without_a_verifier_it_says_so(make_own_server: ServerFactory) -> None:
    with running(make_own_server(models=["wisp_generate"])) as server:
        code, error = refusal(server)
        assert code == 400  # of every error of a model, says Triton
        assert error.startswith("unavailable: model 'wisp_verifier' cannot be reached, it has to be loaded too: ")
