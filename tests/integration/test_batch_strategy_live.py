"""The batching strategy inside a real tritonserver, with a model that tells how many requests it was called with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.integration.conftest import ServerFactory
from tests.integration.support import wait_until
from triton_models.server_process import ServerProcess
from wisp_plugin.estimator import Costs
from wisp_plugin.profile import Fingerprint, Measurement, Profile, save_profile

pytestmark = [pytest.mark.integration, pytest.mark.alone]

FOLDER = Path(__file__).resolve().parents[2] / "wisp_plugin" / "batch_strategy"
BUSY_S = 0.5
# A pass takes 1 ms and 1 ms per token, as far as the strategy knows.
PROFILE = Profile(
    Fingerprint("counter", "0", "float32", "CPU", 1, {}),
    Costs((0.001, 0.0, 0.001, 0.0, 0.0, 0.0), (0.0,) * 6, 1.0),
    1.0,
    0.05,
    Measurement(1, 1, 0.0, 0.0, 1.0, "2026-01-01", "0"),
)
CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 8
instance_group [ {{ count: 1, kind: KIND_CPU }} ]
input [ {{ name: "TOKENS", data_type: TYPE_INT32, dims: [ -1 ], allow_ragged_batch: true }} ]
output [ {{ name: "BATCH", data_type: TYPE_INT32, dims: [ 1 ] }} ]
dynamic_batching {{ default_queue_policy {{ allow_timeout_override: true }} }}
parameters {{ key: "{key}", value: {{ string_value: "{value}" }} }}
parameters {{ key: "WISP_TOKENS_INPUT", value: {{ string_value: "TOKENS" }} }}
"""
MODEL = f"""
import pathlib
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        tokens = [pb_utils.get_input_tensor_by_name(request, "TOKENS").as_numpy() for request in requests]
        if any(row.ravel()[0] < 0 for row in tokens):
            pathlib.Path(__file__).with_name("busy").touch()
            time.sleep({BUSY_S})
        size = np.array([[len(requests)]], np.int32)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("BATCH", size)]) for _ in requests]
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """batchstrategy.so."""
    build = tmp_path_factory.mktemp("batch_strategy")
    done = subprocess.run(
        ["make", "-C", str(FOLDER), "-j2", f"BUILD={build}", "OPTIMIZE=-O1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return build / "batchstrategy.so"


def write_model(repository: Path, name: str, library: Path, key: str, value: str) -> None:
    """A model with the strategy and one parameter for its costs."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    shutil.copy(library, version / "batchstrategy.so")
    (version / "model.py").write_text(MODEL)
    (repository / name / "config.pbtxt").write_text(CONFIG.format(name=name, key=key, value=value))
    save_profile(PROFILE, repository / name / "profile.json")


@pytest.fixture
def counting(library: Path, tmp_path: Path, make_own_server: ServerFactory) -> Iterator[ServerProcess]:
    """A server with the model `counter` loaded and a model `broken` that cannot be."""
    repository = tmp_path / "models"
    write_model(repository, "counter", library, "WISP_PROFILE", "profile.json")
    write_model(repository, "broken", library, "WISP_PROFIL", "profile.json")
    with make_own_server(model_repository=repository, models=("counter",)) as server:
        yield server


def num_queued(server: ServerProcess) -> int:
    """Requests that wait for the instance of `counter`."""
    page = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    found = re.search(r'^nv_inference_pending_request_count{model="counter",version="1"} (\d+)', page, re.MULTILINE)
    return int(found[1]) if found else -1


def send(client: triton.InferenceServerClient, tokens: list[int], **parameters: int) -> Future[int]:
    """Send one request; the future holds the number of requests in its batch."""
    answer: Future[int] = Future()
    tensor = triton.InferInput("TOKENS", [1, len(tokens)], "INT32")
    tensor.set_data_from_numpy(np.array([tokens], np.int32))

    def done(result: triton.InferResult | None, error: Exception | None) -> None:
        if result is None:
            answer.set_exception(error or RuntimeError("no answer"))
        else:
            answer.set_result(int(result.as_numpy("BATCH")[0, 0]))

    client.async_infer("counter", [tensor], done, parameters=parameters)
    return answer


def batch_sizes(
    server: ServerProcess, repository: Path, client: triton.InferenceServerClient, slack_s: float
) -> list[int]:
    """Three small requests with a deadline and one of 3 s wait for the instance: the batch sizes that they see."""
    is_busy = repository / "counter" / "1" / "busy"
    is_busy.unlink(missing_ok=True)
    busy = send(client, [-1])
    wait_until(is_busy.exists, 10.0)
    deadline_us = int((time.time() + BUSY_S + slack_s) * 1e6)
    answers = []
    for number, tokens in enumerate(([1], [1], [1], [1] * 3000), 1):  # each behind the one before
        answers.append(send(client, tokens, **({"wisp_deadline_us": deadline_us} if number < 4 else {})))
        wait_until(lambda n=number: num_queued(server) == n, BUSY_S)
    assert busy.result(20) == 1
    return [answer.result(20) for answer in answers]


def control(server: ServerProcess, model: str, action: str) -> str:
    """`load` or `unload` a model; returns the server's error message, empty if there is none."""
    url = f"http://{server.http_url}/v2/repository/models/{model}/{action}"
    try:
        urllib.request.urlopen(urllib.request.Request(url, data=b"{}", method="POST"), timeout=20).close()
    except urllib.error.HTTPError as error:
        return str(json.loads(error.read())["error"])
    return ""


def test_the_strategy_in_a_real_server(counting: ServerProcess, tmp_path: Path) -> None:
    with triton.InferenceServerClient(counting.grpc_url) as client:
        assert batch_sizes(counting, tmp_path / "models", client, slack_s=1.0) == [3, 3, 3, 1]
        assert batch_sizes(counting, tmp_path / "models", client, slack_s=60.0) == [4, 4, 4, 4]
        assert "Loading custom batching strategy library" in counting.log_path.read_text()
        # The rest on the same server, because starting one takes longer than all of this.
        assert 'parameter "WISP_PROFIL" is unknown; allowed: WISP_PROFILE, ' in control(counting, "broken", "load")
        assert control(counting, "counter", "unload") == ""
        wait_until(lambda: not client.is_model_ready("counter"), 10.0)
        assert control(counting, "counter", "load") == ""
        assert batch_sizes(counting, tmp_path / "models", client, slack_s=1.0) == [3, 3, 3, 1]
    assert counting.running
