"""Somebody's model on a running Triton server: bursts of requests of one size, and what its batches took.

Times are Triton's own: the model's statistics tell for every batch size how many batches ran and how long they
computed. So neither network nor queue is in them, and requests that the dynamic batcher put together are seen as one.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import triton_to_np_dtype

from triton_models.artifacts import Progress
from triton_models.plugin_config import parse_inputs
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.estimator import EMPTY_PASS, Floats, item_features

_REQUEST_LIMIT_S = 120.0
_TOO_LATE = "StatusCode.DEADLINE_EXCEEDED"  # the client's limit, not one of the server's
_SHOWN_EVERY_S = 5.0  # while there is no answer
Answers = queue.SimpleQueue[Exception | None]  # of requests: nothing, or what failed


@dataclass(frozen=True, slots=True)
class RequestSize:
    """What one request brings: `num_tokens` in the first tokens input, `num_drafts` in the second, and its context.

    Without a tokens input `num_tokens` is its batch dimension.
    """

    num_tokens: int
    num_drafts: int = 0
    num_context: int = 0

    def features(self, num_requests: int) -> Floats:
        """Features of a batch of so many, `[F]`, as the batching strategy counts them."""
        each = item_features(self.num_context, self.num_tokens + self.num_drafts, 1 + self.num_drafts)
        return EMPTY_PASS + num_requests * each

    def in_words(self) -> str:
        """As in `256 new tokens, 15 draft tokens, 1 context token`; without what there is none of."""
        counts = {"new": self.num_tokens, "draft": self.num_drafts, "context": self.num_context}
        return ", ".join(f"{n} {kind} token{'' if n == 1 else 's'}" for kind, n in counts.items() if n)


class RemoteModel:
    """A model that batches dynamically, on the server at `url` (HOST:PORT of gRPC)."""

    def __init__(
        self, url: str, name: str, tokens_input: str | None, context_input: str | None,
        shapes: Mapping[str, Sequence[int]], progress: Progress,
    ) -> None:  # fmt: skip
        """`tokens_input` and `context_input` as WISP_TOKENS_INPUT and WISP_CONTEXT_INPUT; `shapes` (without the batch
        dimension) of other inputs whose shape config.pbtxt leaves open; `progress` hears of long waiting.

        Raises:
            ModelError: no server, no such model, or it is not ready.
            ConfigError: the model does not batch, or an input is unknown or of unknown shape.
        """
        self.name, self._url, self._progress = name, url, progress
        self._client = triton.InferenceServerClient(url)
        try:
            self.config = self._client.get_model_config(name, client_timeout=_REQUEST_LIMIT_S).config
        except triton.InferenceServerException as error:
            raise self._failed(error) from None
        if self.config.max_batch_size < 1:
            raise ConfigError(f"model {name!r} has max_batch_size 0: it does not batch, there is nothing to decide")
        self._sized = parse_inputs(self.config, tokens_input, context_input)
        self._shapes = dict(shapes)
        self._check_shapes()

    @property
    def has_second_input(self) -> bool:
        """True if draft tokens come in an input of their own."""
        return len(self._sized.tokens) > 1

    @property
    def has_context(self) -> bool:
        """True if an input tells the context."""
        return self._sized.context is not None

    @property
    def max_tokens(self) -> int | None:
        """The most elements that the sized inputs can have; None: any number."""
        if not self._sized.tokens:
            return int(self.config.max_batch_size)
        dims = next(one.dims for one in self.config.input if one.name == self._sized.tokens[0])
        return None if -1 in dims else int(np.prod(dims))

    def burst(self, size: RequestSize, num_requests: int) -> dict[int, tuple[int, float]]:
        """Send so many requests at once; for every number of requests that a batch had: batches, and mean seconds.

        Raises ModelError if a request fails or is not answered within 120 s.
        """
        inputs = [self._input(one, size) for one in self.config.input]
        before = self._batches()
        answers: Answers = queue.SimpleQueue()
        for _ in range(num_requests):
            self._client.async_infer(
                self.name, inputs, callback=lambda result, error: answers.put(error), client_timeout=_REQUEST_LIMIT_S
            )
        self._wait(answers, size, num_requests)
        per_request = 1 if self._sized.tokens else size.num_tokens
        taken: dict[int, tuple[int, float]] = {}
        for batch_size, (count, seconds) in self._batches().items():
            count0, seconds0 = before.get(batch_size, (0, 0.0))
            if count > count0 and batch_size % per_request == 0:
                taken[batch_size // per_request] = (count - count0, (seconds - seconds0) / (count - count0))
        return taken

    def _wait(self, answers: Answers, size: RequestSize, num_requests: int) -> None:
        """Until all of a burst are answered; tells of it if that takes long. ModelError for the first that fails."""
        start_s, num_answered = time.perf_counter(), 0
        sent = f"a request of {size.in_words()}" + (f" ({num_requests} at once)" if num_requests > 1 else "")
        while num_answered < num_requests:
            try:
                error = answers.get(timeout=_SHOWN_EVERY_S)
            except queue.Empty:
                waited_s = time.perf_counter() - start_s
                self._progress(f"profile: no answer to {sent} for {waited_s:.0f} of {_REQUEST_LIMIT_S:.0f} s")
                continue  # every request is answered in the end, if only by its client's limit
            if error is not None:
                raise self._failed(error, sent)
            num_answered += 1

    def _batches(self) -> dict[int, tuple[int, float]]:
        """Per batch size: batches so far, and their seconds of input, computing and output."""
        try:
            stats = self._client.get_inference_statistics(self.name, client_timeout=_REQUEST_LIMIT_S).model_stats[-1]
        except triton.InferenceServerException as error:
            raise self._failed(error) from None
        return {
            int(one.batch_size): (
                int(one.compute_infer.count),
                1e-9 * (one.compute_input.ns + one.compute_infer.ns + one.compute_output.ns),
            )
            for one in stats.batch_stats
        }

    def _failed(self, error: Exception, sent: str | None = None) -> ModelError:
        """What to raise for an error of the client; `sent` None: a question about the model, not to it."""
        model, reason = f"model {self.name!r} on {self._url}", " ".join(str(error).split())
        if isinstance(error, triton.InferenceServerException) and error.status() == _TOO_LATE:
            hint = "; requests get smaller by --max-tokens and --max-context" if sent else ""
            return ModelError(f"{model} did not answer {sent or 'at all'} within {_REQUEST_LIMIT_S:g} s{hint}")
        return ModelError(f"{model} refuses {sent}: {reason}" if sent else f"{model}: {reason}")

    def _input(self, one: Any, size: RequestSize) -> triton.InferInput:
        tokens, context = self._sized.tokens, self._sized.context
        counts = dict(zip(tokens, (size.num_tokens, size.num_drafts), strict=False))
        fill: Any = 1
        if one.name == context and self._sized.context_is_value:
            fill = size.num_context
        elif one.name == context:
            counts[one.name] = size.num_context
        shape = list(self._shapes.get(one.name, one.dims))
        if one.name in counts and -1 in one.dims:
            shape = [1 if dim == -1 else int(dim) for dim in one.dims]
            shape[list(one.dims).index(-1)] = counts[one.name] // max(1, int(np.prod(shape)))
        batch = 1 if tokens else size.num_tokens
        dtype = self.config_dtype(one)
        kind = triton_to_np_dtype(dtype)
        array = np.full((batch, *shape), b"" if dtype == "BYTES" else fill, np.object_ if dtype == "BYTES" else kind)
        tensor = triton.InferInput(one.name, list(array.shape), dtype)
        tensor.set_data_from_numpy(array)
        return tensor

    @staticmethod
    def config_dtype(one: Any) -> str:
        """The wire's name of an input's data type."""
        name = one.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[one.data_type].name
        return "BYTES" if name == "TYPE_STRING" else name.removeprefix("TYPE_")

    def _check_shapes(self) -> None:
        names = {one.name for one in self.config.input}
        unknown = sorted(set(self._shapes) - names)
        if unknown:
            allowed = ", ".join(sorted(names))
            raise ConfigError(f"--shape names {unknown[0]!r}, no input of the model; allowed: {allowed}")
        sized = {*self._sized.tokens, self._sized.context}
        for one in self.config.input:
            if -1 in one.dims and one.name not in sized and one.name not in self._shapes:
                raise ConfigError(f"input {one.name!r} has shape {list(one.dims)}; give it by --shape {one.name}:D1,D2")
