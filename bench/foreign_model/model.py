"""A Triton model that knows nothing of WISP: a batch costs a base and so much per token.

The cost is counted in units, products of small matrices. Half of them are computed; for the time of the other half, as
measured beforehand, it waits, as a model does whose accelerator computes. So a batch on a machine with other work to do
takes as long as on an idle one, unless it is slower by half. Units and their time stand in the model's parameters.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

SIDE = 64  # of the matrices: they stay in the cache nearest to the core


def work(units: int) -> None:
    """So many products, one thread (the environment says so)."""
    left, right = np.full((SIDE, SIDE), 0.5, np.float32), np.full((SIDE, SIDE), 1.0 / SIDE, np.float32)
    for _ in range(units):
        left = left @ right


def work_and_wait(units: int, unit_s: float) -> None:
    """The time of so many units from now on: half of them computed."""
    end_s = time.perf_counter() + units * unit_s
    work(units // 2)
    time.sleep(max(0.0, end_s - time.perf_counter()))


class TritonPythonModel:
    """As Triton sees it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what a batch costs."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._base_units = int(parameters["base_units"]["string_value"])
        self._units_per_token = float(parameters["units_per_token"]["string_value"])
        self._unit_s = float(parameters["unit_s"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One batch: everybody is answered when all of it is done."""
        lengths = [pb_utils.get_input_tensor_by_name(request, "IDS").as_numpy().size for request in requests]
        work_and_wait(self._base_units + round(self._units_per_token * sum(lengths)), self._unit_s)
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("LENGTH", np.array([[length]], np.int32))])
            for length in lengths
        ]
