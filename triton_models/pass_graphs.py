"""Passes as CUDA graphs, for devices where the CPU that launches kernels is the limit.

Of a pass only attention depends on who is in it; everything between two attentions is the same for every pass of so
many rows. It is recorded once per number of rows: a run of the model whose kernels are noted and not executed, where
each call of attention ends a graph and begins the next. A pass is then a replay of these graphs with the real
attention between them, and neither the model's code nor the compiler's runs. Its rows are padded to the next recorded
number; no row of a packed pass depends on another except through attention, which leaves padded rows alone.

(vLLM calls this piecewise graphs. PyTorch's own, `torch.compile(mode="reduce-overhead")`, cannot be replayed by
another thread than the one that recorded before 2.13: pytorch/pytorch#123177.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from triton_models.packed_attention import Attention, PackedPass, output_shape
from wisp_plugin.errors import ModelError

# Rows of the passes that are recorded. Up to 64 rows a matrix product takes as long as its weights take to be read;
# with more rows than the last, the device is slower than the CPU.
SIZES = (8, 16, 32, 64, 96, 128, 192, 256)

# (input_ids [1, T], positions [1, T], attention, keep [R]) -> logits [R, V]
ModelPass = Callable[[torch.Tensor, torch.Tensor, Attention, torch.Tensor], torch.Tensor]

log = logging.getLogger(__name__)


class Graph(Protocol):
    """`torch.cuda.CUDAGraph`."""

    def capture_end(self) -> None:
        """Stop noting kernels."""

    def replay(self) -> None:
        """Launch what was noted."""


class Recorder(Protocol):
    """What recording needs of the device."""

    def aside(self) -> Any:
        """Context in which graphs can be recorded."""

    def begin(self) -> Graph:
        """From now on kernels are noted in the graph that is returned."""

    def discard(self, graph: Graph) -> None:
        """Stop recording `graph` after a failure."""

    def borrow(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory, without keeping it from being used again by what is recorded later."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A graph that ends at an attention, and where its inputs lie and its output has to go (zeros after a replay)."""

    graph: Graph
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float | None
    output: torch.Tensor


class _Recording:
    """Stands in for a `PackedPass` while the model is recorded.

    One class also for the run before, in which kernels are compiled, chosen and loaded: compiled layers know it then,
    and are not compiled once more while they are recorded.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        """`recorder` None: nothing is recorded, and attention gives zeros."""
        self.pieces: list[_Piece] = []
        self.graph: Graph | None = None  # the one that is being recorded
        self._recorder = recorder

    def begin(self) -> None:
        """Begin the next graph."""
        assert self._recorder is not None
        self.graph = self._recorder.begin()

    def end(self) -> Graph:
        """End the graph."""
        graph, self.graph = self.graph, None
        assert graph is not None
        graph.capture_end()
        return graph

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """End of one graph and begin of the next."""
        output = query.new_zeros(output_shape(query))  # part of the graph: padded rows are zeros in every replay
        if self._recorder is not None:
            graph = self.end()
            query, key, value, place = map(self._recorder.borrow, (query, key, value, output))
            self.pieces.append(_Piece(graph, layer, query, key, value, scaling, place))
            self.begin()
        return output


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Memory that recorded graphs read: int64 `[1, T]`, `[1, T]` and `[T]`."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    keep: torch.Tensor

    def set(self, input_ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> None:
        """Fill in a pass; what is behind it is of an earlier one, valid and without influence."""
        self.input_ids[:, : input_ids.shape[1]] = input_ids
        self.positions[:, : positions.shape[1]] = positions
        self.keep[: len(keep)] = keep


@dataclass(frozen=True, slots=True)
class _RecordedPass:
    """All graphs of one number of rows."""

    inputs: _Inputs
    pieces: Sequence[_Piece]
    last: Graph
    logits: torch.Tensor

    def run(
        self, input_ids: torch.Tensor, positions: torch.Tensor, packed_pass: PackedPass, keep: torch.Tensor
    ) -> torch.Tensor:
        self.inputs.set(input_ids, positions, keep)
        for piece in self.pieces:
            piece.graph.replay()
            packed_pass.attend_into(piece.output, piece.layer, piece.query, piece.key, piece.value, piece.scaling)
        self.last.replay()
        return self.logits[: len(keep)].clone()  # the next pass writes there


class PassGraphs:
    """The recorded passes of a model by their number of rows; none at first. Any thread may run them, one at a time."""

    def __init__(self) -> None:
        self._passes: dict[int, _RecordedPass] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that are recorded, ascending."""
        return tuple(sorted(self._passes))

    def fits(self, num_rows: int) -> bool:
        """True if a pass of so many rows is recorded, padded or not."""
        return num_rows <= max(self._passes, default=0)

    @torch.inference_mode()
    def record(self, model_pass: ModelPass, device: torch.device, recorder: Recorder, sizes: Sequence[int]) -> None:
        """Record passes of `sizes` rows; none is there if that fails with whatever the device says."""
        start_s = time.perf_counter()
        try:
            with recorder.aside():
                for size in sorted(sizes, reverse=True):  # the largest first: the others use its memory again
                    self._passes[size] = _record(model_pass, device, recorder, size)
        except BaseException:
            self.forget()
            raise
        log.info("passes of up to %d rows recorded in %.1f s", max(sizes), time.perf_counter() - start_s)

    def forget(self) -> None:
        """Free the graphs and their memory."""
        self._passes.clear()

    @torch.inference_mode()
    def run(
        self, input_ids: torch.Tensor, positions: torch.Tensor, packed_pass: PackedPass, keep: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[R, V]` of the rows `keep` `[R]`, no more than there are; for a number of rows that `fits`."""
        size = min(size for size in self._passes if size >= input_ids.shape[1])
        return self._passes[size].run(input_ids, positions, packed_pass, keep)


def _record(model_pass: ModelPass, device: torch.device, recorder: Recorder, size: int) -> _RecordedPass:
    """One run to warm up, one that is recorded."""
    row, rows = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((1, size), (size,)))
    inputs = _Inputs(row, row.clone(), rows)
    model_pass(inputs.input_ids, inputs.positions, _Recording(None), inputs.keep)
    recording = _Recording(recorder)
    try:
        recording.begin()
        logits = model_pass(inputs.input_ids, inputs.positions, recording, inputs.keep)
        last = recording.end()
    except BaseException:
        if recording.graph is not None:
            recorder.discard(recording.graph)
        raise
    return _RecordedPass(inputs, recording.pieces, last, recorder.borrow(logits))


def record_passes(graphs: PassGraphs, choice: str, record: Callable[[], None]) -> bool:
    """`record`, which fills `graphs` and tries them; True if they are to be used now.

    With `auto`, where that fails, a warning says so and passes run as they did.

    Raises:
        ModelError: it failed, and `choice` is `graphs`.
    """
    try:
        record()
    except Exception as error:  # whatever driver, kernels and code of this model come up with
        graphs.forget()
        line = f"passes cannot be recorded here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        if choice != "auto":
            raise ModelError(f"{line}; allowed: compile=auto, always or never") from error
        log.warning("%s: kernels are launched one by one, which is slower", line)
        return False
    return True
