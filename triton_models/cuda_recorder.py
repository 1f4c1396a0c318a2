"""`Recorder` of passes for a CUDA device: see pass_graphs.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from triton_models.pass_graphs import Graph

_broken: list[Any] = []  # graphs whose recording failed: the allocator goes on asking them whether they record


class CudaRecorder:
    """`Recorder` for a CUDA device. All graphs share one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A stream of its own, as the default one cannot be recorded."""
        had_collector = gc.isenabled()
        gc.collect()  # not while recording: it could free what CUDA does not allow to be freed then
        gc.disable()
        try:
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                yield
            torch.cuda.current_stream(self._device).wait_stream(stream)
            torch.cuda.synchronize(self._device)
        finally:
            torch.cuda.empty_cache()  # what warming up took on that stream would be of no use to others
            if had_collector:
                gc.enable()

    def begin(self) -> Graph:
        """See `Recorder`. Other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        except RuntimeError:
            self.discard(graph)
            raise
        return graph

    def discard(self, graph: Graph) -> None:
        """See `Recorder`. What fails at the end of a failed recording has been reported by then."""
        try:
            graph.capture_end()
        except RuntimeError:
            _broken.append(graph)
            with suppress(Exception):  # private functions, and without them memory is only used less well
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)

    def borrow(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Recorder`. NumPy-like memory has no bfloat16, so that the bits travel as an integer."""
        bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])
        return torch.as_tensor(_Memory(bits), device=self._device).view(tensor.dtype)


class _Memory:
    """Memory by its address, for `torch.as_tensor`; it does not keep the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__
