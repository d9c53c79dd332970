"""ONNX files that are made for the tests: the logit is a weight times the mean of the pixels, plus a bias."""

import pytest

pytest.importorskip("onnx", reason='needs pip install ".[export]"')
pytest.importorskip("onnxruntime", reason='needs pip install ".[export]"')

from onnx import TensorProto, helper, save

TYPES = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}


def write_graph(
    path, dtype="uint8", batch="N", channels=3, column=False, weight=0.05, bias=-6.0, outside=None
):
    """Write a graph for images of 8 px.

    Args:
        column: whether the output is (N, 1), not (N,).
        outside: the file that the weight is read from, instead of this one.
    """
    constants = [
        helper.make_tensor("weight", TensorProto.FLOAT, [1], [weight]),
        helper.make_tensor("bias", TensorProto.FLOAT, [1], [bias]),
        helper.make_tensor("axes", TensorProto.INT64, [3 - column], [2, 3] if column else [1, 2, 3]),
        helper.make_tensor("channels", TensorProto.INT64, [1], [1]),
    ]
    if outside:
        constants[0].ClearField("float_data")
        constants[0].data_location = TensorProto.EXTERNAL
        for key, value in (("location", outside), ("offset", "0"), ("length", "4")):
            entry = constants[0].external_data.add()
            entry.key, entry.value = key, value
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "weight"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["logit" if not column else "each"]),
    ]
    if column:
        nodes.append(helper.make_node("ReduceMean", ["each", "channels"], ["logit"], keepdims=1))
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("images", TYPES[dtype], [batch, channels, 8, 8])],
        [helper.make_tensor_value_info("logit", TensorProto.FLOAT, [batch, 1] if column else [batch])],
        constants,
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path
