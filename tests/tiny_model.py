"""A tiny random Llama with a tokenizer of its own, and draft graphs of it by the real exporter; made once per run.

The workers of a run share what one of them has made: an export takes several seconds.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper

VOCAB_SIZE = 320
CONTEXT_LENGTH = 2048
CORPUS = ["the quick brown fox jumps over the lazy dog", "naïve café, 東京, 🙂🙃", "def f(x):\n    return x + 1\n"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


FOLDER_VARIABLE = "WISP_TINY_FOLDER"  # conftest.py sets it: the folder of a run, for all its workers


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="wisp-tiny-")


@contextmanager
def _making(name: str) -> Iterator[tuple[Path, bool]]:
    """The folder `name`, and whether this process has to fill it; other processes wait until it has."""
    root = Path(os.environ.get(FOLDER_VARIABLE) or _own_folder().name)
    folder, made = root / name / "model", root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_new = not made.exists()
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed half-way
        yield folder, is_new
        made.touch()


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE: every byte is a token, so characters do split over tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@functools.cache
def hf_folder() -> Path:
    """The Hugging Face folder of the tiny model. Not to be changed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        initializer_range=0.2,  # larger than usual: logits that tell the tokens apart
    )
    with _making("hf") as (folder, is_new):
        if is_new:
            LlamaForCausalLM(config).save_pretrained(folder)
            write_tokenizer(folder)
    return folder


@functools.cache
def draft_folder(precision: str) -> Path:
    """A draft graph of the tiny model. Not to be changed."""
    from edge_runtime.export import export_draft

    with _making(precision) as (folder, is_new):
        if is_new:
            export_draft(hf_folder(), folder, precision, progress=lambda line: None)  # type: ignore[arg-type]
    return folder


@functools.cache
def community_folder() -> Path:
    """The same fp32 graph in the layout of the ONNX community: growing KV, no positions."""
    with _making("community") as (folder, is_new):
        if is_new:
            (folder / "onnx").mkdir(parents=True)
            for name in ("model.onnx", "model.onnx.data"):
                shutil.copyfile(draft_folder("fp32") / name, folder / "onnx" / name)
            shutil.copyfile(hf_folder() / "config.json", folder / "config.json")
    return folder


def target_logits(tokens: np.ndarray) -> np.ndarray:
    """float32 [V] behind `tokens`, by transformers."""
    import torch

    with torch.inference_mode():
        return _torch_model()(torch.tensor(tokens[None].astype(np.int64))).logits[0, -1].numpy()


@functools.cache
def _torch_model() -> object:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(hf_folder()).eval()


@functools.cache
def positions_folder() -> Path:
    """A graph with `position_ids` in the community's layout: a sum of token and position vectors kept as KV."""
    tables = {name: numpy_helper.from_array(table, name) for name, table in _tables().items()}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in
                 {"axis1": [1], "axis2": [2], "seq": 2, "no_heads": [0, -1, 8], "end": [1 << 30]}.items()]
    nodes = [
        helper.make_node("Gather", ["tokens", "input_ids"], ["k3"]),
        helper.make_node("Gather", ["places", "position_ids"], ["v3"]),
        helper.make_node("Unsqueeze", ["k3", "axis1"], ["k"]),
        helper.make_node("Unsqueeze", ["v3", "axis1"], ["v"]),
        helper.make_node("Concat", ["past_key_values.0.key", "k"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "v"], ["present.0.value"], axis=2),
        helper.make_node("Add", ["present.0.key", "present.0.value"], ["both"]),
        helper.make_node("CumSum", ["both", "seq"], ["sums"]),
        helper.make_node("Shape", ["input_ids"], ["num_new"], start=1),
        helper.make_node("Neg", ["num_new"], ["first_new"]),
        helper.make_node("Slice", ["sums", "first_new", "end", "axis2"], ["last"]),
        helper.make_node("Reshape", ["last", "no_heads"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    kv_shape = ["batch", 1, "past", 8]
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length]) for name, length in
           (("input_ids", "n"), ("attention_mask", "total"), ("position_ids", "n"))]
    kinds = [f"0.{kind}" for kind in ("key", "value")]
    past = [helper.make_tensor_value_info(f"past_key_values.{kind}", TensorProto.FLOAT, kv_shape) for kind in kinds]
    present = [helper.make_tensor_value_info(f"present.{kind}", TensorProto.FLOAT, None) for kind in kinds]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "n", VOCAB_SIZE])
    graph = helper.make_graph(nodes, "tiny", ids + past, [logits, *present], [*tables.values(), *constants])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with _making("positions") as (folder, is_new):
        if is_new:
            (folder / "onnx").mkdir(parents=True)
            onnx.save(model, folder / "onnx" / "model_quantized.onnx")
            (folder / "config.json").write_text(json.dumps({"max_position_embeddings": CONTEXT_LENGTH}))
    return folder


def positions_logits(tokens: np.ndarray) -> np.ndarray:
    """What the graph of `positions_folder` computes, by numpy."""
    tables = _tables()
    return (tables["tokens"][tokens] + tables["places"][: len(tokens)]).sum(axis=0) @ tables["head"]


def _tables() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    shapes = {"tokens": (VOCAB_SIZE, 8), "places": (CONTEXT_LENGTH, 8), "head": (8, VOCAB_SIZE)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
