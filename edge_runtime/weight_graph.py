"""From an fp32 draft graph to one of 4 and 8-bit weights (see `error_compensation`); only an export runs this.

MatMulNBits with blocks of 32 and int8 activations throughout, ONNX Runtime's fast path on CPUs; 8-bit weights are
rounded to nearest by its own quantizer. Gate and up projection of an MLP read the same input and become one product,
which makes up for some of the time of 8-bit weights. The embedding becomes a table of its own, in 8 bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

from edge_runtime.calibration import calibration_texts, measure_inputs
from edge_runtime.error_compensation import BLOCK_SIZE, Floats, quantize
from wisp_plugin.errors import ModelError

_PRODUCT = {"block_size": BLOCK_SIZE, "accuracy_level": 4}  # level 4: activations in int8
_LOOKUP = {"bits": 8, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
_DOMAIN = "com.microsoft"
Packed = npt.NDArray[np.uint8]  # [N, blocks, bytes of a block]


def quantize_graph(folder: Path, is_4bit: Callable[[str], bool], progress: Callable[[str], None]) -> None:
    """Replace `folder`/model.onnx, fp32 in the builder's layout, by its quantized form.

    `is_4bit` is asked for every product by its name, such as `/model/layers.3/mlp/up_proj/MatMul`; the others get
    8 bits, and so do those whose inputs are not a multiple of 32. `folder` must hold the tokenizer's files.

    Raises:
        ModelError: not a graph that can be quantized.
    """
    path = folder / "model.onnx"
    graph = WeightGraph(onnx.load(str(path)))
    if not graph.products:
        raise ModelError(f"{path} has no products with constant weights")
    in_4_bits = [name for name in graph.products if is_4bit(name) and graph.num_inputs(name) % BLOCK_SIZE == 0]
    sources = {name: graph.source(name) for name in in_4_bits}
    grams = measure_inputs(path, sorted(set(sources.values())), calibration_texts(folder), progress) if sources else {}
    for number, (name, source) in enumerate(sources.items()):
        if number % 30 == 0:
            progress(f"rounding with compensation: {number} of {len(sources)} products")
        blocks = quantize(graph.weight(name), grams[source])
        packed = blocks.integers[:, :, 0::2] | blocks.integers[:, :, 1::2] << 4
        graph.replace(name, 4, packed.astype(np.uint8), blocks.scales)
    for name in graph.products:
        if name not in sources:
            graph.replace(name, 8, *_rounded(graph.weight(name)))
    graph.join_gates()
    graph.quantize_embedding()
    graph.save(path)


def _rounded(weight: Floats) -> tuple[Packed, Floats]:
    """`weight` `[K, N]` in 8 bits: integers `[N, blocks, 32]` and scales `[N, blocks]`; a last block is padded."""
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, bits=8)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight))
    return packed, scales


class WeightGraph:
    """A graph whose products with constant weights (`products`, by name) are replaced one by one."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._arrays = {tensor.name: tensor for tensor in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self.products = {
            node.name: node
            for node in model.graph.node
            if node.op_type == "MatMul" and len(getattr(self._arrays.get(node.input[1]), "dims", ())) == 2
        }

    def num_inputs(self, name: str) -> int:
        """K of product `name`."""
        return int(self._arrays[self.products[name].input[1]].dims[0])

    def weight(self, name: str) -> Floats:
        """`[K, N]` of product `name`."""
        return self._array(self.products[name].input[1])

    def source(self, name: str) -> str:
        """The tensor that product `name` reads, for all tokens: the head's is cut to the last one."""
        tensor = self.products[name].input[0]
        while tensor in self._makers and self._makers[tensor].op_type in ("Gather", "Unsqueeze"):
            tensor = self._makers[tensor].input[0]
        return str(tensor)

    def replace(self, name: str, bits: int, packed: Packed, scales: Floats) -> None:
        """Make product `name` a MatMulNBits of these weights."""
        node = self.products[name]
        weight = node.input[1]
        num_inputs, num_outputs = self._arrays[weight].dims
        names = (self._add(f"{weight}_Q{bits}", packed), self._add(f"{weight}_scales", scales))
        sizes = {"K": num_inputs, "N": num_outputs, "bits": bits}
        node.CopyFrom(_node("MatMulNBits", (node.input[0], *names), node.output, f"{name}_Q{bits}", sizes | _PRODUCT))

    def join_gates(self) -> None:
        """One product for gate and up projection of each MLP, and a split of its result."""
        nodes = {node.name: node for node in self._model.graph.node if node.op_type == "MatMulNBits"}
        for name, gate in nodes.items():
            up = nodes.get(name.replace("/gate_proj/", "/up_proj/"))
            if "/gate_proj/" in name and up is not None and gate.input[0] == up.input[0]:
                bits = {helper.get_node_attr_value(node, "bits") for node in (gate, up)}
                if len(bits) == 1:
                    self._join(gate, up)

    def _join(self, gate: NodeProto, up: NodeProto) -> None:
        name, outputs = gate.name, (gate.output[0], up.output[0])
        widths = [helper.get_node_attr_value(node, "N") for node in (gate, up)]
        weights = [
            self._add(f"{gate.input[i]}_and_up", np.concatenate([self._array(node.input[i]) for node in (gate, up)]))
            for i in (1, 2)
        ]
        sizes = {key: helper.get_node_attr_value(gate, key) for key in ("K", "bits")} | {"N": sum(widths)}
        joined = (f"{name}/gate_and_up",)
        gate.CopyFrom(_node("MatMulNBits", (gate.input[0], *weights), joined, gate.name, sizes | _PRODUCT))
        widths_name = self._add(f"{name}/widths", np.array(widths, np.int64))
        split = helper.make_node("Split", [*joined, widths_name], outputs, f"{name}/split", axis=-1)
        up.CopyFrom(split)

    def quantize_embedding(self) -> None:
        """Look tokens up in 8 bits, also where the model ties the table to a head of 4 bits: it costs no time."""
        nodes = self._model.graph.node
        node = next((node for node in nodes if node.op_type == "Gather" and node.input[1] == "input_ids"), None)
        if node is None:
            return
        maker = self._makers.get(node.input[0])  # of a tied table: transposes the head's weight
        source = node.input[0] if maker is None else maker.input[0]
        if source not in self._arrays or (maker is not None and maker.op_type != "Transpose"):
            return
        table = self._array(source)
        if table.shape[1 if maker is None else 0] % BLOCK_SIZE:
            return  # padded rows would have to be cut again
        packed, scales = _rounded(table.T if maker is None else table)
        names = [self._add("embedding_Q8", packed.reshape(len(packed), -1)), self._add("embedding_scales", scales)]
        inputs = (names[0], node.input[1], names[1])
        node.CopyFrom(_node("GatherBlockQuantized", inputs, node.output, f"{node.name}_Q8", _LOOKUP))

    def save(self, path: Path) -> None:
        """Write the graph without the weights that nothing reads any more, its weights beside it."""
        graph = self._model.graph
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        kept_nodes = [node for node in graph.node if read & set(node.output)]
        kept = [tensor for name, tensor in self._arrays.items() if any(name in node.input for node in kept_nodes)]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(kept_nodes)
        graph.initializer.extend(kept)
        if not any(opset.domain == _DOMAIN for opset in self._model.opset_import):
            self._model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
        data = path.with_name(path.name + ".data")
        data.unlink(missing_ok=True)  # onnx appends
        onnx.save(self._model, str(path), save_as_external_data=True, location=data.name, size_threshold=1024)
        shutil.copymode(path, data)  # onnx makes it readable for its owner only

    def _array(self, name: str) -> Any:
        return numpy_helper.to_array(self._arrays[name])

    def _add(self, name: str, array: npt.NDArray[Any]) -> str:
        self._arrays[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name


def _node(kind: str, inputs: Any, outputs: Any, name: str, attributes: dict[str, Any]) -> NodeProto:
    """A node of ONNX Runtime's own operators."""
    return helper.make_node(kind, list(inputs), list(outputs), name, domain=_DOMAIN, **attributes)
