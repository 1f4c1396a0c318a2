"""What goes into the products of a draft graph, measured over a few chat turns; only an export runs this.

The turns are in calibration.json: 24 questions of ours, answered by SmolLM2-135M-Instruct (greedy, 64 tokens at most).
None of them is an evaluation prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from edge_runtime.error_compensation import Floats, gram_matrix
from edge_runtime.tokenizer import Tokenizer
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Tokens

_TURNS = Path(__file__).with_name("calibration.json")


def calibration_texts(folder: Path) -> list[Tokens]:
    """The turns as the model in `folder` reads them; without a chat template as plain text."""
    tokenizer = Tokenizer.load(folder)
    texts = []
    for turn in json.loads(_TURNS.read_text(encoding="utf-8")):
        try:
            asked = tokenizer.encode_chat([{"role": "user", "content": turn["question"]}])
        except ModelError:
            asked = tokenizer.encode(turn["question"] + "\n")
        texts.append(np.concatenate([asked, tokenizer.encode(turn["answer"], add_special_tokens=False)]))
    return texts


def measure_inputs(
    path: Path, sources: Sequence[str], texts: Sequence[Tokens], progress: Callable[[str], None]
) -> dict[str, Floats]:
    """Gram matrix (see `gram_matrix`) of every tensor in `sources` over `texts`, by the fp32 graph at `path`.

    Raises:
        ModelError: the graph cannot be run.
    """
    decoder = json.loads((path.parent / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    kv_shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    model = onnx.load(str(path), load_external_data=False)
    for name in sources:
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    measuring = path.with_name("measuring.onnx")  # beside the weights, which it names by a relative path
    onnx.save(model, str(measuring))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    grams: dict[str, Floats] = {}
    try:
        session = ort.InferenceSession(str(measuring), options, providers=["CPUExecutionProvider"])
        for number, tokens in enumerate(texts):
            if number % 4 == 0:
                progress(f"measuring inputs: {number} of {len(texts)} texts")
            found = session.run(list(sources), _feeds(session, tokens, kv_shape))
            for name, rows in zip(sources, found, strict=True):
                gram = gram_matrix(rows.reshape(-1, rows.shape[-1]))
                grams[name] = grams[name] + gram if name in grams else gram
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot measure the inputs of {path}: {reason[0]}") from None
    finally:
        measuring.unlink()
    return grams


def _feeds(session: ort.InferenceSession, tokens: Tokens, kv_shape: tuple[int, ...]) -> dict[str, Any]:
    """One text behind no past."""
    no_past = np.zeros(kv_shape, np.float32)
    past = {node.name: no_past for node in session.get_inputs() if node.name.startswith("past_key_values.")}
    mask = np.ones((1, len(tokens)), np.int64)
    return {"input_ids": tokens[None].astype(np.int64), "attention_mask": mask, **past}
