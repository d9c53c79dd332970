"""From the traced ONNX file in float32 to the files of a format and a precision.

`fp16` stores weights as 16-bit floats and computes as before. `int8` stores weights as 8-bit integers per
channel and multiplies 8-bit integers; the scales of the activations are fixed on real images, after what is
large in them has been moved into the weights (SmoothQuant, arXiv 2211.10438). Scales that follow each input,
as in dynamic quantization, ruin the features of CLIP.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.export.tracing import INPUT
from featdistill.runtimes.exported import GRAPH_FILES
from featdistill.runtimes.graph import require

# Smaller constants are shapes, norms and biases, which do not matter to the size.
_MIN_HALVED = 4096


def write_files(
    traced: Path, folder: Path, graph_format: str, precision: str, inputs: Sequence[np.ndarray]
) -> None:
    """Write the files of a graph into a folder.

    Args:
        traced: what `write_onnx` wrote, in another folder.
        inputs: for `int8`, images (3, S, S) uint8 to fix the scales on.
    """
    path = folder / GRAPH_FILES[graph_format][1]
    writer = _write_onnx if graph_format == "onnx" else _write_openvino
    writer(traced, path, precision, inputs)


def _write_onnx(traced: Path, path: Path, precision: str, inputs: Sequence[np.ndarray]) -> None:
    onnx = require("onnx")
    model = onnx.load(str(traced))
    if precision == "fp16":
        _halve_weights(model)
    elif precision == "int8":
        model = _quantized(model, inputs)
    large = model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data")


def _write_openvino(traced: Path, path: Path, precision: str, inputs: Sequence[np.ndarray]) -> None:
    openvino = require("openvino")
    model = openvino.convert_model(traced)
    if precision == "int8":
        model = _quantized(model, inputs)
    openvino.save_model(model, path, compress_to_fp16=precision == "fp16")


def _halve_weights(model: Any) -> None:
    """Store large constants in float16, with a cast after each that runtimes compute once."""
    onnx = require("onnx")
    graph, casts = model.graph, []
    for constant in graph.initializer:
        if constant.data_type == onnx.TensorProto.FLOAT and np.prod(constant.dims) >= _MIN_HALVED:
            name, values = constant.name, onnx.numpy_helper.to_array(constant)
            halved = onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.fp16")
            constant.CopyFrom(halved)
            casts.append(onnx.helper.make_node("Cast", [halved.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _quantized(model: Any, inputs: Sequence[np.ndarray]) -> Any:
    """Return a model of ONNX or OpenVINO with 8-bit matrix products and convolutions."""
    nncf = require("nncf")
    nncf.set_log_level(logging.ERROR)
    images: Callable[[np.ndarray], dict] = lambda image: {INPUT: image[None]}  # noqa: E731
    return nncf.quantize(
        model,
        nncf.Dataset(inputs, images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(inputs),
    )
