"""What Triton and its Python backend cost by themselves: the least that any verifier on this wire can take.

Takes the requests and gives the responses of `wisp_verifier`, tensor by tensor, but does nothing: a pass is a pause,
all that has arrived by then takes part. `wisp-bench e2e` measures the path to it beside the path to the real one.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

PASS_S = 0.04


class TritonPythonModel:
    """Answers every request with a commit of four tokens."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the thread that answers."""
        self._arrived: list[tuple[Any, float]] = []
        self._wake = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        """Read the request as an adapter would, and queue it."""
        for request in requests:
            json.loads(request.parameters())
            for tensor in request.inputs():
                tensor.as_numpy()
            with self._wake:
                self._arrived.append((request.get_response_sender(), time.monotonic()))
                self._wake.notify()

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not self._arrived:
                    self._wake.wait()
                batch, self._arrived = self._arrived, []
            started_s = time.monotonic()
            time.sleep(PASS_S)
            measured_s = time.monotonic() - started_s
            for sender, arrived_s in batch:
                sender.send(_commit(started_s - arrived_s, measured_s))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _commit(waited_s: float, measured_s: float) -> Any:
    tensors = {
        "START": np.zeros(1, np.int32),
        "TOKENS": np.zeros(4, np.int32),
        "ORIGIN": np.zeros(4, np.uint8),
        "TIMING_US": np.array([1e6 * waited_s, 0, 1e6 * measured_s, 1], np.int64),
        "LOAD": np.zeros(2, np.float32),
        "STATUS": np.zeros(1, np.int32),
    }
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])
