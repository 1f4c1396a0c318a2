"""`wisp_generate` on Triton's side: text responses. Beside `pb_adapter` the only importer of Triton's module."""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils

from triton_models.generate_session import Ending, Failure
from triton_models.pb_adapter import ResponseStream, make_response
from wisp_plugin.wire_values import Array


class TextReply(ResponseStream):
    """`generate_session.Reply` over the response sender of a decoupled request."""

    def send(self, text: str) -> None:
        """Stream a piece of text."""
        self.send_tensors(_text(text))

    def finish(self, ending: Ending) -> None:
        """The last response."""
        numbers = {"num_input_tokens": ending.num_input_tokens, "num_output_tokens": ending.num_output_tokens}
        tensors = {
            **_text(ending.text),
            "finish_reason": np.array([ending.reason.encode()], np.object_),
            **{name: np.array([value], np.int32) for name, value in numbers.items()},
            "seed": np.array([ending.seed], np.int64),
        }
        self.end(make_response(tensors))

    def fail(self, failure: Failure) -> None:
        """End with a Triton error."""
        codes = pb_utils.TritonError
        error = codes(failure.message, codes.UNAVAILABLE if failure.is_ours else codes.INVALID_ARG)
        self.end(pb_utils.InferenceResponse(output_tensors=[], error=error))


def _text(text: str) -> dict[str, Array]:
    return {"text_output": np.array([text.encode(errors="replace")], np.object_)}
