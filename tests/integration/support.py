"""What the integration tests share: the judge of tokens, sessions against a server, a raw tritonclient stream."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from bench.live import Drafting, SessionResult, make_open
from edge_runtime.client import EdgeClient
from edge_runtime.transport import GrpcStream
from triton_models.server_process import ServerProcess
from wisp_plugin.coupling import choose_token, chosen_logprob, final_scores
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.home import default_draft_dir, default_target_dir
from wisp_plugin.messages import Commit, Mode, Open, Sampling, Tokens
from wisp_plugin.wire import decode_commit
from wisp_plugin.wire_values import Array, Parameter

TIE = 1e-3  # scores closer than this may come out either way (DESIGN.md section 3)
CLASSES = "tight=60000/10000, loose=90000/20000"  # SLOs that are met anywhere
QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short poem about a lighthouse in winter.",
    "What are the main differences between Python and C?",
)
GREEDY = Sampling()
SAMPLED = Sampling(seed=7, temperature=0.8, top_p=0.95)
PENALIZED = Sampling(seed=8, temperature=0.8, top_p=0.95, repetition_penalty=1.1)


@functools.cache
def prompts() -> tuple[Tokens, ...]:
    """`QUESTIONS` in the chat template of the default model, as token ids."""
    from edge_runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(default_draft_dir("int8"))
    return tuple(tokenizer.encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS)


class Judge:
    """The default target alone, by plain transformers: is every token the one that it would have chosen there?

    One forward over prompt and generated tokens gives the logits of all positions at once. By induction from
    the prompt, every token being the target's own choice behind those before it is the same as equality with the
    target alone; and behind a tie the rest is still checked.
    """

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(default_target_dir()).eval()

    def logits(self, tokens: Tokens, num_generated: int) -> np.ndarray:
        """float32 `[num_generated, V]`: what the last `num_generated` of `tokens` were chosen from."""
        import torch

        with torch.inference_mode():
            rows = self._model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
        return rows[len(tokens) - num_generated - 1 : -1]

    def check(self, prompt: Tokens, generated: Tokens, sampling: Sampling) -> None:
        """Fail unless `generated` is what the target alone gives behind `prompt`, up to ties."""
        tokens = np.concatenate([prompt, generated])
        for i, row in enumerate(self.logits(tokens, len(generated))):
            position = len(prompt) + i
            own, got = choose_token(row, sampling, position, tokens[:position]), int(generated[i])
            if own != got:
                scores = final_scores(row, sampling, position, tokens[:position])
                gap = float(scores[own] - scores[got])
                assert gap < TIE, f"token {i} is {got}, the target's own is {own} (scores differ by {gap:g})"

    def logprobs(self, prompt: Tokens, generated: Tokens) -> np.ndarray:
        """float `[len(generated)]`: log-probabilities before filters at temperature 1."""
        rows = self.logits(np.concatenate([prompt, generated]), len(generated))
        return np.array([chosen_logprob(row, int(token)) for row, token in zip(rows, generated, strict=True)])


# -- sessions ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Session:
    """An edge session that a test can drive step by step and abandon."""

    opened: Open
    state: EdgeSession
    transport: GrpcStream
    client: EdgeClient

    @classmethod
    def make(
        cls,
        server: str,
        opened: Open,
        drafting: Drafting | None = None,
        on_commit: Callable[[Commit], None] = lambda commit: None,
        state: EdgeSession | None = None,
    ) -> Session:
        """A session that is not open yet; with `state` it resumes what an earlier connection left."""
        drafting = drafting or Drafting()
        state = state or drafting.session(opened)
        transport = GrpcStream(server)
        client = EdgeClient(opened, state, transport, drafting.drafter, on_commit=on_commit)
        return cls(opened, state, transport, client)

    def run(self, num_tokens: int | None = None) -> Tokens:
        """Generate until the end, or until at least `num_tokens` are there; returns what has been generated."""
        tokens = self.client.run()
        while (num_tokens is None or len(self.state.generated) < num_tokens) and next(tokens, None) is not None:
            pass
        return self.state.generated.copy()

    def vanish(self) -> None:
        """Break the connection as a process that dies does: no close message, no orderly end of the stream."""
        stream = self.transport._client
        assert stream is not None
        stream.stop_stream(cancel_requests=True)


def run_together(jobs: list[Callable[[], SessionResult]]) -> list[SessionResult]:
    """Run all `jobs` at the same time; their results in order."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def thin_open(prompt: Tokens, num_tokens: int, sampling: Sampling = GREEDY, mode: Mode = Mode.FREE) -> Open:
    """An open that runs to `num_tokens`, whatever the model says about ending."""
    return make_open(prompt, num_tokens, mode, sampling)


# -- the raw wire -----------------------------------------------------------------------------------------------

TRITON_DTYPES = {"int32": "INT32", "int64": "INT64", "uint8": "UINT8", "float32": "FP32", "object": "BYTES"}


class RawStream:
    """A tritonclient stream without any of our client's checks."""

    def __init__(self, server: str) -> None:
        self._client = triton.InferenceServerClient(server)
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._client.start_stream(callback=lambda result, error: self._answers.put((result, error)))

    def send(self, tensors: dict[str, Array], **parameters: Parameter) -> None:
        """Send one request with exactly these tensors and parameters."""
        inputs = []
        for name, array in tensors.items():
            tensor = triton.InferInput(name, list(array.shape), TRITON_DTYPES[array.dtype.name])
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        self._client.async_stream_infer("wisp_verifier", inputs, parameters=parameters)

    def commit(self, timeout_s: float = 15.0) -> Commit:
        """The next answer, which must be a commit."""
        result, error = self._answers.get(timeout=timeout_s)
        assert error is None, f"the server answered with an error: {error}"
        names = [output.name for output in result.get_response().outputs]
        return decode_commit({name: result.as_numpy(name) for name in names if result.as_numpy(name) is not None})

    def error(self, timeout_s: float = 15.0) -> str:
        """The next answer, which must be an error of one line."""
        result, error = self._answers.get(timeout=timeout_s)
        assert result is None, f"the server accepted it: {result.get_response()}"
        message = str(error.message())
        assert message, "an error without a message"
        assert "\n" not in message, message
        assert "Traceback" not in message, message
        return message

    def close(self) -> None:
        """Leave; what still runs after a moment is cancelled.

        Not at once: tritonserver 2.51 crashes when a cancellation meets the last response of a stream.
        """
        ending = threading.Thread(target=self._client.stop_stream, daemon=True)
        ending.start()
        ending.join(0.5)
        if ending.is_alive():
            self._client.stop_stream(cancel_requests=True)
        self._client.close()


@contextlib.contextmanager
def raw_stream(server: str) -> Iterator[RawStream]:
    """A raw stream that is closed at the end."""
    stream = RawStream(server)
    try:
        yield stream
    finally:
        stream.close()


def session_tensor(session: str) -> dict[str, Array]:
    """Tensor SESSION alone."""
    return {"SESSION": np.array([session.encode()], dtype=np.object_)}


def ints(*values: int) -> Array:
    """An int32 vector."""
    return np.array(values, np.int32)


# -- servers ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(server: ServerProcess) -> Iterator[ServerProcess]:
    """`server`, ready; killed at the end, which is not under test: an orderly one takes three seconds."""
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        if server.running:
            server.kill()


# -- looking at a server ----------------------------------------------------------------------------------------


def http_status(url: str) -> int:
    """Status of a GET; 0 if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def model_is_ready(http_url: str) -> bool:
    """What Triton says about the model itself."""
    return http_status(f"http://{http_url}/v2/models/wisp_verifier/ready") == 200


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until `condition` held; fails after `timeout_s`."""
    begin_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begin_s < timeout_s, f"not within {timeout_s:g} s"
        time.sleep(0.02)
    return time.monotonic() - begin_s
