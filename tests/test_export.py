"""The real exporter on a tiny model, and what it refuses."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_runtime import export
from edge_runtime.drafter import Drafter
from edge_runtime.tokenizer import Tokenizer
from tests import tiny_model
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.vocabulary import vocab_hash

TOKENS = np.arange(3, 60, dtype=np.int32)


def _weights(folder: Path) -> list[onnx.NodeProto]:
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return [node for node in graph.node if node.op_type == "MatMulNBits"]


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == name)


@pytest.mark.parametrize(
    ("precision", "bits", "least_correlation"),
    [("int8", 8, 0.999), ("int4", 4, 0.8), ("int4-gptq", 4, 0.8)],
)
def test_quantized_drafts_stay_close_to_the_model(precision: str, bits: int, least_correlation: float) -> None:
    folder = tiny_model.draft_folder(precision)
    weights = _weights(folder)
    assert any("lm_head" in node.name for node in weights)
    assert {_attribute(node, "bits") for node in weights} == {bits}
    assert {_attribute(node, "block_size") for node in weights} == {32}
    assert {_attribute(node, "accuracy_level") for node in weights} == {4}
    logits = Drafter.load(folder, num_threads=1).next_logits(TOKENS)
    correlation = np.corrcoef(logits, tiny_model.target_logits(TOKENS))[0, 1]
    assert least_correlation < correlation < 0.9999999


def test_a_mixed_draft_has_its_robust_projections_in_4_bits() -> None:
    folder = tiny_model.draft_folder("mixed48")
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    bits = {node.name: _attribute(node, "bits") for node in _weights(folder)}
    assert {name.split("/")[-2] for name, width in bits.items() if width == 4} == {"gate_proj", "o_proj", "lm_head"}
    assert {name.split("/")[-2] for name, width in bits.items() if width == 8} == {"qkv_proj", "down_proj"}
    assert not [node.name for node in graph.node if node.op_type == "MatMul"]
    assert {_attribute(node, "accuracy_level") for node in _weights(folder)} == {4}
    logits = Drafter.load(folder, num_threads=1).next_logits(TOKENS)
    expected = tiny_model.target_logits(TOKENS)
    distance = np.abs(logits - expected).mean()
    plain = Drafter.load(tiny_model.draft_folder("int4"), num_threads=1).next_logits(TOKENS)
    assert distance < 0.7 * np.abs(plain - expected).mean()


def test_gate_and_up_are_one_product_and_the_embedding_is_in_8_bits() -> None:
    graph = onnx.load(str(tiny_model.draft_folder("mixed48") / "model.onnx"), load_external_data=False).graph
    assert [node.name for node in graph.node if "up_proj" in node.name] == []
    assert sum(node.op_type == "Split" for node in graph.node) == 2  # one per layer
    (lookup,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert _attribute(lookup, "bits") == 8
    sizes = [list(tensor.dims) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert [64, tiny_model.VOCAB_SIZE] not in sizes, "weights that nothing reads are left out"


def test_fp32_draft_is_the_model() -> None:
    folder = tiny_model.draft_folder("fp32")
    assert not _weights(folder)
    logits = Drafter.load(folder, num_threads=1).next_logits(TOKENS)
    np.testing.assert_allclose(logits, tiny_model.target_logits(TOKENS), atol=2e-4, rtol=1e-4)


def test_graphs_built_without_our_options_draft_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of every token instead of the last one's."""
    monkeypatch.setitem(export._BUILDER_OPTIONS, "fp32", ("prune_lm_head=false",))
    export.export_draft(tiny_model.hf_folder(), tmp_path / "out", "fp32", progress=lambda line: None)
    drafter = Drafter.load(tmp_path / "out", num_threads=1)
    for length in (30, 31, 57):
        expected = tiny_model.target_logits(TOKENS[:length])
        np.testing.assert_allclose(drafter.next_logits(TOKENS[:length]), expected, atol=2e-4, rtol=1e-4)


def test_a_draft_folder_is_complete_and_of_the_same_vocabulary() -> None:
    folder = tiny_model.draft_folder("fp32")
    assert {"model.onnx", "genai_config.json", "config.json", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja"} <= {path.name for path in folder.iterdir()}
    assert vocab_hash(folder) == vocab_hash(tiny_model.hf_folder())
    assert Tokenizer.load(folder).eos_token_ids == (1,)
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")], "scratch left behind"


def _refused(source: Path | str, out: Path, precision: str = "fp32") -> str:
    with pytest.raises((ModelError, ConfigError)) as caught:
        export.export_draft(source, out, precision, progress=lambda line: None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sources_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "allowed: fp32, int8, int4, int4-gptq, mixed48" in _refused(tiny_model.hf_folder(), out, "int3")
    assert "neither a folder nor a model id" in _refused(tmp_path / "nowhere", out)
    (tmp_path / "hf").mkdir()
    assert "config.json is missing" in _refused(tmp_path / "hf", out)
    (tmp_path / "hf" / "config.json").write_text("{")
    assert "tokenizer.json is missing" in _refused(tmp_path / "hf", out)
    (tmp_path / "hf" / "tokenizer.json").touch()
    assert "config.json is damaged" in _refused(tmp_path / "hf", out)
    assert not out.exists()


def test_a_failed_build_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(tiny_model.hf_folder(), source)
    (source / "model.safetensors").write_bytes(b"damaged")
    message = _refused(source, tmp_path / "out")
    assert message.startswith(f"cannot export {source}: ")
    assert "Error" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_foreign_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "not a draft folder" in _refused(tiny_model.hf_folder(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_NEEDED_MODULES", ("onnx", "no_such_module"))
    assert "'no_such_module': install the `export` extra" in _refused(tiny_model.hf_folder(), tmp_path / "out")


def test_command_line_reports_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    args = parser.parse_args([str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert args.precision == "int8"
    assert export.main(args) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_importing_the_edge_side_loads_no_training_stack() -> None:
    code = (
        "import sys, edge_runtime.export, edge_runtime.drafter, edge_runtime.tokenizer; "
        "print(*{'torch', 'transformers', 'onnxruntime_genai', 'onnx', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
