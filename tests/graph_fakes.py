"""Graphs without CUDA: operations are noted by a dispatch mode and done again, into the same memory, at a replay."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeGraph(TorchDispatchMode):
    """Notes what is done from its creation to `capture_end`."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.noted.append((func, args, kwargs or {}, result))
        return result

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def replay(self) -> None:
        for func, args, kwargs, result in self.noted:
            for place, value in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class FakeRecorder:
    """A `Recorder` for a CPU; `fail_at` is the number of the graph that cannot be begun."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.graphs: list[FakeGraph] = []
        self.discarded: list[FakeGraph] = []
        self._fail_at = fail_at

    def aside(self) -> Any:
        return nullcontext()

    def begin(self) -> FakeGraph:
        if len(self.graphs) == self._fail_at:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        self.graphs.append(FakeGraph())
        return self.graphs[-1]

    def discard(self, graph: FakeGraph) -> None:
        graph.capture_end()
        self.discarded.append(graph)

    def borrow(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor
