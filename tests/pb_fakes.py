"""Triton's module `triton_python_backend_utils`, which exists only inside its backend: what our adapters use of it."""

from __future__ import annotations

import sys
import types
from typing import Any, ClassVar

NAME = "triton_python_backend_utils"
FINAL = 1


class FakeSender:
    """A response sender that, like Triton's, must not be asked about a request after its final flag."""

    def __init__(self) -> None:
        self.responses: list[Any] = []
        self.ended = False
        self.cancelled = False

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.ended, "a response after the final flag"
        self.responses.append(response)
        self.ended = bool(flags & FINAL)

    def is_cancelled(self) -> bool:
        assert not self.ended, "a question after the final flag frees what it is about"
        return self.cancelled


class FakeFamily:
    """A metric family that, like prometheus-cpp's, has counters that only grow; `told` records every round trip."""

    COUNTER, GAUGE = "counter", "gauge"
    told: ClassVar[list[tuple[str, float]]] = []

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def Metric(self, labels: dict[str, str]) -> types.SimpleNamespace:
        key = " ".join([self.name, *labels.values()])

        def increment(value: float) -> None:
            assert self.kind == self.COUNTER
            assert value > 0, f"{key} would shrink"
            FakeFamily.told.append((key, value))

        def set_to(value: float) -> None:
            assert self.kind == self.GAUGE
            FakeFamily.told.append((key, value))

        return types.SimpleNamespace(increment=increment, set=set_to)


class TritonError(tuple[str, str]):
    """Message and code."""

    INVALID_ARG, UNAVAILABLE = "invalid", "unavailable"

    def __new__(cls, message: str, code: str = "internal") -> TritonError:
        return super().__new__(cls, (message, code))


def install() -> None:
    """Make it importable, once per process: our adapters keep the one they were imported with."""
    if NAME in sys.modules:
        return
    fake: Any = types.ModuleType(NAME)
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    fake.Tensor = lambda name, array: (name, array)
    fake.TritonError = TritonError
    fake.MetricFamily = FakeFamily
    fake.InferenceResponse = lambda output_tensors=None, error=None: (output_tensors, error)
    sys.modules[NAME] = fake
