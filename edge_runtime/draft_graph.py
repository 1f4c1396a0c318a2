"""The two layouts of draft graph, behind one interface: one sequence, KV inside, logits of the last token out.

`SharedKvGraph`   folder of onnxruntime-genai's builder (genai_config.json): GroupQueryAttention writes new KV into
                  the buffer it reads from; the attention mask says how much of it is valid, so a rollback is free.
`GrowingKvGraph`  folder of the ONNX community / transformers.js (config.json, onnx/model*.onnx): every run gives
                  longer KV tensors; a rollback copies what is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Tokens

Logits = npt.NDArray[np.float32]
ACCEPTED_LAYOUTS = "model.onnx with genai_config.json, or onnx/model.onnx with config.json"
_FIRST_CAPACITY_TOKENS = 512
_NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class DraftGraph(Protocol):
    """A draft model with the KV of one sequence."""

    vocab_size: int
    context_length: int  # tokens that the model was made for

    def forward(self, tokens: Tokens, num_past: int) -> Logits:
        """Feed `tokens` behind the first `num_past` tokens fed before; what stood behind those is forgotten.

        Returns float32 `[vocab_size]`, the logits behind the last token: a view that the next call overwrites.
        """
        ...

    def sibling(self) -> DraftGraph:
        """The same model, its weights in memory once, with a KV of its own. Graphs may run at the same time."""
        ...


def load_graph(folder: Path, num_threads: int = 0) -> DraftGraph:
    """The draft graph in `folder`; `num_threads` 0 leaves the number to ONNX Runtime.

    Raises:
        ModelError: no folder, no graph of a known layout, or a damaged one.
    """
    if not folder.is_dir():
        raise ModelError(f"draft folder {folder} does not exist")
    if (folder / "genai_config.json").is_file():
        path, config = _builder_graph(folder)
        return SharedKvGraph(_open_session(path, num_threads), path, config)
    if (folder / "config.json").is_file() and (folder / "onnx").is_dir():
        path = _community_graph(folder / "onnx")
        return GrowingKvGraph(_open_session(path, num_threads), path, _read_json(folder / "config.json"))
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ModelError(f"{folder} holds no known draft graph: found {found}; accepted: {ACCEPTED_LAYOUTS}")


class SharedKvGraph:
    """KV in place. All buffers are bound once: a step writes two integers and runs."""

    def __init__(self, session: ort.InferenceSession, path: Path, config: dict[str, Any]) -> None:
        self._session = session
        self._origin = path, config
        self._signature = _Signature(session, path, config)
        self.vocab_size = self._signature.vocab_size
        self.context_length = self._signature.context_length
        self._kv: dict[str, npt.NDArray[np.generic]] = {}
        self._mask = np.zeros((1, 0), np.int64)
        self._step_ids = np.zeros((1, 1), np.int64)
        self._step_logits = np.zeros((1, 1, self.vocab_size), self._signature.logits_type)
        self._step = session.io_binding()
        self._reserve(_FIRST_CAPACITY_TOKENS, num_kept=0)

    def forward(self, tokens: Tokens, num_past: int) -> Logits:
        """See `DraftGraph.forward`."""
        end = num_past + len(tokens)
        if end > self._mask.shape[1]:
            self._reserve(end, num_past)
        self._mask[0, :end] = 1
        self._mask[0, end:] = 0
        if len(tokens) == 1:
            self._step_ids[0, 0] = tokens[0]
            self._session.run_with_iobinding(self._step)
            return self._step_logits[0, -1].astype(np.float32, copy=False)
        ids = tokens.astype(np.int64).reshape(1, -1)
        num_rows = 1 if self._signature.only_last_logits else len(tokens)
        logits = np.empty((1, num_rows, self.vocab_size), self._signature.logits_type)
        binding = self._session.io_binding()
        self._bind(binding, ids, logits)
        self._session.run_with_iobinding(binding)
        return logits[0, -1].astype(np.float32, copy=False)

    def sibling(self) -> SharedKvGraph:
        """See `DraftGraph.sibling`."""
        return SharedKvGraph(self._session, *self._origin)

    def _reserve(self, num_tokens: int, num_kept: int) -> None:
        """Make room for `num_tokens`, doubling, and keep the first `num_kept`."""
        capacity = max(_FIRST_CAPACITY_TOKENS, self._mask.shape[1])
        while capacity < num_tokens:
            capacity *= 2
        grown = {}
        for name, kind in self._signature.kv_types.items():
            grown[name] = np.zeros((1, self._signature.num_kv_heads, capacity, self._signature.head_size), kind)
            if num_kept:
                grown[name][:, :, :num_kept] = self._kv[name][:, :, :num_kept]
        self._kv = grown
        self._mask = np.zeros((1, capacity), np.int64)
        self._step.clear_binding_inputs()
        self._step.clear_binding_outputs()
        self._bind(self._step, self._step_ids, self._step_logits)

    def _bind(self, binding: ort.IOBinding, ids: npt.NDArray[np.int64], logits: npt.NDArray[np.generic]) -> None:
        """Bind by address: past and present are the same buffer, which is what makes the KV in place."""
        inputs = {"input_ids": ids, "attention_mask": self._mask, **self._kv}
        outputs = {"logits": logits} | {_present(name): array for name, array in self._kv.items()}
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class GrowingKvGraph:
    """KV as tensors that grow with every run."""

    def __init__(self, session: ort.InferenceSession, path: Path, config: dict[str, Any]) -> None:
        self._session = session
        self._origin = path, config
        self._signature = _Signature(session, path, config)
        self.vocab_size = self._signature.vocab_size
        self.context_length = self._signature.context_length
        self._kv_names = list(self._signature.kv_types)
        self._output_names = ["logits", *(_present(name) for name in self._kv_names)]
        self._kv: dict[str, ort.OrtValue] = {}
        self._num_kv = 0

    def forward(self, tokens: Tokens, num_past: int) -> Logits:
        """See `DraftGraph.forward`."""
        self._roll_back(num_past)
        end = num_past + len(tokens)
        feeds = {"input_ids": tokens.reshape(1, -1), "attention_mask": np.ones((1, end), np.int64)}
        if "position_ids" in self._signature.input_types:
            feeds["position_ids"] = np.arange(num_past, end).reshape(1, -1)
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, self._signature.input_types[name]))
            for name, array in feeds.items()
        }
        logits, *kv = self._session.run_with_ort_values(self._output_names, values | self._kv)
        self._kv = dict(zip(self._kv_names, kv, strict=True))
        self._num_kv = end
        return logits.numpy()[0, -1].astype(np.float32, copy=False)

    def sibling(self) -> GrowingKvGraph:
        """See `DraftGraph.sibling`."""
        return GrowingKvGraph(self._session, *self._origin)

    def _roll_back(self, num_kept: int) -> None:
        """Cut the KV to `num_kept` tokens; also makes the empty KV of the first run."""
        if num_kept == self._num_kv and self._kv:
            return
        for name, kind in self._signature.kv_types.items():
            if num_kept:
                kept = np.ascontiguousarray(self._kv[name].numpy()[:, :, :num_kept])
            else:
                kept = np.zeros((1, self._signature.num_kv_heads, 0, self._signature.head_size), kind)
            self._kv[name] = ort.OrtValue.ortvalue_from_numpy(kept)
        self._num_kv = num_kept


class _Signature:
    """What a graph takes and gives, checked against the contract of both layouts."""

    def __init__(self, session: ort.InferenceSession, path: Path, config: dict[str, Any]) -> None:
        inputs = {node.name: node for node in session.get_inputs()}
        outputs = {node.name: node for node in session.get_outputs()}
        self.input_types = {name: _numpy_type(node, path) for name, node in inputs.items()}
        self.kv_types = {name: kind for name, kind in self.input_types.items() if name.startswith("past_key_values.")}
        allowed = {"input_ids", "attention_mask", "position_ids", *self.kv_types}
        missing = {"input_ids", "attention_mask"} - set(inputs)
        absent = {"logits", *map(_present, self.kv_types)} - set(outputs)
        if missing or absent or set(inputs) - allowed or not self.kv_types:
            found = ", ".join(name for name in inputs if name not in self.kv_types)
            raise ModelError(
                f"{path} is no draft graph: inputs {found} and {len(self.kv_types)} past_key_values; accepted: "
                "input_ids, attention_mask, optionally position_ids, past_key_values.N.key/value "
                "to logits, present.N.key/value"
            )
        key_shape = inputs[next(iter(self.kv_types))].shape
        logits = outputs["logits"]
        self.logits_type = _numpy_type(logits, path)
        self.only_last_logits = logits.shape[1] == 1
        self.num_kv_heads = _dimension(key_shape[1], config.get("num_key_value_heads"), "number of KV heads", path)
        self.head_size = _dimension(key_shape[3], config.get("head_dim"), "head size", path)
        self.vocab_size = _dimension(logits.shape[-1], config.get("vocab_size"), "vocabulary size", path)
        length = config.get("context_length", config.get("max_position_embeddings"))
        self.context_length = _dimension(length, None, "context length", path)


def _open_session(path: Path, num_threads: int) -> ort.InferenceSession:
    if not path.is_file():
        raise ModelError(f"draft graph {path} does not exist")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about fallbacks that are meant
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"draft graph {path} cannot be loaded: {reason[0]}") from None


def _builder_graph(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Graph and configuration of the builder's layout, the latter under the names of config.json."""
    model = _read_json(folder / "genai_config.json").get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        raise ModelError(f"{folder / 'genai_config.json'} is damaged: model.decoder is missing")
    path = folder / str(decoder.get("filename", "model.onnx"))
    return path, {**model, **decoder, "head_dim": decoder.get("head_size")}


def _community_graph(folder: Path) -> Path:
    graphs = sorted(folder.glob("model*.onnx"))
    preferred = folder / "model.onnx"
    if preferred in graphs or len(graphs) == 1:
        return preferred if preferred in graphs else graphs[0]
    names = ", ".join(path.name for path in graphs) or "none"
    raise ModelError(f"{folder} must hold model.onnx or exactly one model*.onnx; found {names}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: a JSON object is needed")
    return value


def _present(past_name: str) -> str:
    return past_name.replace("past_key_values.", "present.", 1)


def _numpy_type(node: ort.NodeArg, path: Path) -> type[np.generic]:
    if node.type not in _NUMPY_TYPES:
        raise ModelError(f"{path}: {node.name!r} is {node.type}; accepted: {', '.join(_NUMPY_TYPES)}")
    return _NUMPY_TYPES[node.type]


def _dimension(in_graph: Any, in_config: Any, meaning: str, path: Path) -> int:
    """A size from the graph, else from the configuration beside it."""
    for value in (in_graph, in_config):
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(f"{path}: neither the graph nor the configuration beside it tells the {meaning}")
