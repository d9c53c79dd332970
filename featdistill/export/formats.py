"""From the traced ONNX file in float32 to the files of a format and a precision.

`fp16` stores weights as 16-bit floats and computes as before. `int8_weights` stores weights as 8-bit
integers, each channel with its scale, and computes as before. `int8` also multiplies 8-bit integers: every
32 values that come in are rounded with a scale of their own. (One scale for all, as in plain dynamic
quantization, ruins the features of CLIP, and fixed scales moved logits of a CLIP ViT-B/16 by more than 1.)
In ONNX, `int8` is ONNX Runtime's own operation, with scales for every 32 weights, too.

Only the layers of the blocks become 8-bit. Stem, projection and head are a small part of the work, and made
most of the error of a CLIP ViT-B/16 whose weights were rounded.
"""

import ast
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.export.tracing import quiet
from featdistill.runtimes.exported import GRAPH_FILES
from featdistill.runtimes.graph import require

# Values that share a scale in `int8`: with more, logits of a CLIP ViT-B/16 move further; fewer are slower.
GROUP = 32
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_SCOPES = "pkg.torch.onnx.name_scopes"
# Smaller constants are shapes, norms and biases, which do not matter to the size.
_MIN_HALVED = 4096


def write_files(
    traced: Path, folder: Path, graph_format: str, stored: str, modules: Collection[str] = ()
) -> None:
    """Write the files of a graph into a folder.

    Args:
        traced: what `write_onnx` wrote.
        stored: `fp32`, `fp16`, `int8` or `int8_weights`.
        modules: names of the modules that become 8-bit, see `tracing.block_modules`.
    """
    onnx = require("onnx")
    path = folder / GRAPH_FILES[graph_format][1]
    model = onnx.load(str(traced))
    kept = _others(model, modules)
    for node in model.graph.node:
        del node.metadata_props[:]  # among them places on this machine
    if stored == "int8" and graph_format == "onnx":
        model = _with_8_bit_products(model, kept)
    if stored.startswith("int8"):
        _quantize_weights(model, kept)
    if stored == "fp16":
        _halve_weights(model)
    if graph_format == "openvino":
        openvino = require("openvino")
        if stored != "fp32":
            traced = traced.with_name(f"{traced.name}.{stored}.onnx")
            onnx.save(model, str(traced))
        # OpenVINO's own float16 rounds the normalization and all biases, too.
        openvino.save_model(openvino.Core().read_model(traced), path, compress_to_fp16=False)
        return
    is_large = model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF
    onnx.save(model, str(path), save_as_external_data=is_large, location=f"{path.name}.data")


def _others(model: Any, modules: Collection[str]) -> list[str]:
    """Return the nodes that multiply, but are not in one of the modules."""
    names = []
    for node in model.graph.node:
        scopes = ast.literal_eval({entry.key: entry.value for entry in node.metadata_props}[_SCOPES])
        # The last scope is the operation itself; the one before it is the module.
        if node.op_type in _PRODUCTS and scopes[-2] not in modules:
            names.append(node.name)
    return names


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


def _quantize_weights(model: Any, kept: Collection[str]) -> None:
    """Store the weights of all but some nodes as 8-bit integers, with a scale per channel in float32."""
    onnx = require("onnx")
    constants, nodes = {constant.name: constant for constant in model.graph.initializer}, []
    for node in model.graph.node:
        weight = constants.get(node.input[1]) if node.op_type in _PRODUCTS else None
        if weight is not None and node.name not in kept and weight.data_type == onnx.TensorProto.FLOAT:
            values, name = onnx.numpy_helper.to_array(weight), weight.name
            is_transposed = any(one.name == "transB" and one.i for one in node.attribute)
            axis = 0 if node.op_type == "Conv" or is_transposed else values.ndim - 1
            others = tuple(number for number in range(values.ndim) if number != axis)
            scale = np.maximum(np.abs(values).max(axis=others, keepdims=True), 1e-12) / 127
            weight.CopyFrom(
                onnx.numpy_helper.from_array(np.rint(values / scale).astype(np.int8), f"{name}.int8")
            )
            scales = onnx.numpy_helper.from_array(scale.astype(np.float32).ravel(), f"{name}.scale")
            model.graph.initializer.append(scales)
            inputs = [weight.name, scales.name]
            nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [name], axis=axis))
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _with_8_bit_products(model: Any, kept: Collection[str]) -> Any:
    """Return a model whose matrix products with weights, but some, are those of ONNX Runtime in 8 bits."""
    with quiet():
        quantization = require("onnxruntime.quantization.matmul_nbits_quantizer")
        quantizer = quantization.MatMulNBitsQuantizer(
            model, bits=8, block_size=GROUP, is_symmetric=True, accuracy_level=4, nodes_to_exclude=[*kept]
        )
        quantizer.process()
    return quantizer.model.model
