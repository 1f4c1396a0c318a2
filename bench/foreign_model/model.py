"""A Triton model that knows nothing of WISP: a batch costs a base and so much per token, in real work of the processor.

The work is counted in products of small matrices; how many a base and a token take stands in the model's parameters.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

SIDE = 64  # of the matrices: they stay in the cache nearest to the core


def work(units: int) -> None:
    """So many products, one thread (the environment says so)."""
    left, right = np.full((SIDE, SIDE), 0.5, np.float32), np.full((SIDE, SIDE), 1.0 / SIDE, np.float32)
    for _ in range(units):
        left = left @ right


class TritonPythonModel:
    """As Triton sees it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what a batch costs."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._base_units = int(parameters["base_units"]["string_value"])
        self._units_per_token = float(parameters["units_per_token"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One batch: everybody is answered when all of it is done."""
        lengths = [pb_utils.get_input_tensor_by_name(request, "IDS").as_numpy().size for request in requests]
        work(self._base_units + round(self._units_per_token * sum(lengths)))
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("LENGTH", np.array([[length]], np.int32))])
            for length in lengths
        ]
