"""model.onnx -> the same graph in int8: static quantization by ONNX Runtime, right on every CPU.

Activations are uint8, weights int8, one scale an output channel. A CPU without VNNI adds two products of such
numbers in 16 bits and cuts off what does not fit: weights of 7 bits always do (2 * 255 * 64 = 32,640 < 2**15), so
one model is right on every CPU. Depthwise convolutions are added up in 32 bits and keep 8. What is lost to 7 bits
on average is put back through the bias. The first convolutions, few of the operations and most of the error, and
the classifier stay fp32.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from bundle.golden import Run
from bundle.picture import Pixels
from training.export import ONNX

METHOD = "QDQ, MinMax, uint8 activations, int8 weights a channel of 7 bits (depthwise 8), biases corrected"
WEIGHTED = ("Conv", "Gemm", "MatMul")
OPERATORS = [*WEIGHTED, "Add", "Clip", "Relu", "MaxPool"]
LEVELS, LEVELS_DEPTHWISE = 64, 127  # steps from 0 to the largest weight of a channel


def to_int8(source: Path, target: Path, pixels: Pixels, kept: int) -> None:
    """Write the graph `source` in int8, the first `kept` of `weighted` and the last one in fp32.

    pixels: uint8 [N, H, W, 3], calibration's.
    """
    model = onnx.load(source)
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{i}"
    *nodes, classifier = weighted(model.graph)
    first, rest = nodes[:kept], nodes[kept:]
    depthwise = [node for node in rest if _is_depthwise(node, model.graph)]
    _put_back(model, source, rest, pixels)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        onnx.save(model, Path(scratch) / ONNX)
        quantize_static(
            Path(scratch) / ONNX,
            target,
            _Batches(pixels),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            nodes_to_exclude=[node.name for node in (*first, classifier)],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={
                "MatMulConstBOnly": True,
                "TensorQuantOverrides": {node.input[1]: [{"reduce_range": False, "axis": 0}] for node in depthwise},
            },
        )
    onnx.checker.check_model(target)


def is_int8(graph: Any) -> bool:
    return any(node.op_type in ("QuantizeLinear", "QLinearConv", "ConvInteger") for node in graph.node)


def weighted(graph: Any) -> list[Any]:
    """The nodes that multiply by trained weights, in order; the last one is the classifier."""
    constants = {tensor.name for tensor in graph.initializer}
    return [node for node in graph.node if node.op_type in WEIGHTED and node.input[1] in constants]


def _weights(node: Any, graph: Any) -> NDArray[np.float64]:
    tensor = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
    return np.asarray(numpy_helper.to_array(tensor), np.float64)


def _groups(node: Any) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def _is_depthwise(node: Any, graph: Any) -> bool:
    """One input channel an output channel: what ONNX Runtime adds up in 32 bits (its MlasConvDepthwise)."""
    return node.op_type == "Conv" and _groups(node) > 1 and _weights(node, graph).shape[:2] == (_groups(node), 1)


def _put_back(model: Any, path: Path, nodes: Sequence[Any], pixels: Pixels) -> None:
    """Take from each convolution's bias what rounding its weights adds to its mean output.

    Nagel et al. 2019 (arXiv:1906.04721), section 4.2, with means of its inputs over the calibration pictures.
    """
    graph = model.graph
    nodes = [node for node in nodes if node.op_type == "Conv" and len(node.input) == 3]
    if not nodes:
        return
    biases = {tensor.name: tensor for tensor in graph.initializer}
    means = _means(path, sorted({node.input[0] for node in nodes}), pixels)
    for node in nodes:
        weights, groups = _weights(node, graph), _groups(node)
        levels = LEVELS_DEPTHWISE if _is_depthwise(node, graph) else LEVELS
        step = np.abs(weights).max(axis=tuple(range(1, weights.ndim)), keepdims=True) / levels
        step[step == 0] = 1
        error = (np.round(weights / step) * step - weights).reshape(*weights.shape[:2], -1).sum(-1)  # [O, I / groups]
        mean = means[node.input[0]].reshape(groups, 1, -1)
        shift = (error.reshape(groups, -1, error.shape[1]) * mean).sum(-1).reshape(-1)
        bias = biases[node.input[2]]
        bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) - shift).astype(np.float32), bias.name))


def _means(path: Path, names: Sequence[str], pixels: Pixels) -> dict[str, NDArray[np.float64]]:
    """The mean of each channel of these values [N, C, ...] of the graph over the pictures."""
    model = onnx.load(path)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    for batch in batches(pixels):
        for name, value in zip(names, session.run(list(names), batch), strict=True):
            sums[name] = sums[name] + value.reshape(*value.shape[:2], -1).mean(axis=2, dtype=np.float64).sum(axis=0)
    return {name: value / len(pixels) for name, value in sums.items()}


def batches(pixels: Pixels, size: int = 4) -> Iterator[dict[str, Pixels]]:
    for start in range(0, len(pixels), size):
        yield {"pixels": pixels[start : start + size]}


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: Pixels) -> None:
        self.batches = batches(pixels)

    def get_next(self) -> dict[str, Pixels] | None:
        return next(self.batches, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice to prepare the model, which its export has done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def in_float(path: Path) -> Run:
    """The same graph computed in float, each number rounded as it says: what another CPU might make of it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]
