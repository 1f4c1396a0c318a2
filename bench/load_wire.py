"""Messages of the wire as Triton's gRPC protocol has them, for clients that are many: no tritonclient objects between.

Names, dtypes and shapes are those of `wisp_plugin.wire`; here they only change their form.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from wisp_plugin.errors import RequestRefused, TransportError
from wisp_plugin.messages import Close, Commit, Draft, Open
from wisp_plugin.wire import decode_commit, encode_request

STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_DATATYPES = {"int32": "INT32", "uint8": "UINT8", "object": "BYTES"}
_DTYPES = {"INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8, "FP32": np.float32}


def encode(message: Open | Draft | Close, model: str) -> bytes:
    """A `ModelInferRequest` for `model`, serialized."""
    parameters, tensors = encode_request(message)
    request = service_pb2.ModelInferRequest(model_name=model, id=message.session)
    for name, value in parameters.items():
        kind = "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "string"
        setattr(request.parameters[name], f"{kind}_param", value)
    for name, array in tensors.items():
        request.inputs.add(name=name, datatype=_DATATYPES[array.dtype.name], shape=array.shape)
        request.raw_input_contents.append(_raw(array))
    data: bytes = request.SerializeToString()
    return data


def decode(data: bytes) -> Commit:
    """The commit in a serialized `ModelStreamInferResponse`.

    Raises:
        RequestRefused: it carries an error.
        TransportError: it is none.
    """
    try:
        message = service_pb2.ModelStreamInferResponse.FromString(data)
    except DecodeError:
        raise TransportError("the server has sent something that is no ModelStreamInferResponse") from None
    if message.error_message:
        raise RequestRefused(" ".join(message.error_message.split())[:300])
    response = message.infer_response
    tensors = {
        output.name: np.frombuffer(raw, _DTYPES[output.datatype]).reshape(tuple(output.shape))
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        if output.datatype in _DTYPES
    }
    return decode_commit(tensors, response.id)


def _raw(array: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    """Little-endian bytes; strings with their length in front."""
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(item)) + item for item in array.reshape(-1))
