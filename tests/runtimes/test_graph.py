"""Graph files: the same numbers however they are run, and one line for files that are not right."""

import copy
import importlib.util
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from graph_files import write_graph

from featdistill.command_line import UserError
from featdistill.data.preprocessing import Preprocessing
from featdistill.runtimes import graph as graph_module
from featdistill.runtimes.graph import RUNTIMES, Graph
from featdistill.runtimes.graph_expert import GraphExpert, require_trained

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), np.uint8)
EXPECTED = PIXELS.mean(axis=(1, 2, 3)) * 0.05 - 6

has = {name: importlib.util.find_spec(name) is not None for name in RUNTIMES}
needs = {name: pytest.mark.skipif(not has[name], reason=f"{name} is not installed") for name in RUNTIMES}
each_runtime = pytest.mark.parametrize(
    "runtime", [pytest.param(name, marks=needs[name]) for name in RUNTIMES]
)


@each_runtime
@pytest.mark.parametrize("batch", ["N", 1, 2])
@pytest.mark.parametrize("column", [False, True])
def test_outputs_do_not_depend_on_runtime_batch_or_shape(tmp_path, runtime, batch, column):
    graph = Graph(write_graph(tmp_path / "model.onnx", batch=batch, column=column), runtime)
    assert (graph.input_name, graph.dtype) == ("images", np.uint8)
    assert graph.shape == (None if batch == "N" else batch, 3, 8, 8)
    np.testing.assert_allclose(graph(PIXELS), EXPECTED, atol=1e-5)
    assert graph(PIXELS[:0]).shape == (0,)


@each_runtime
def test_copies_threads_and_forked_processes_give_the_same(tmp_path, runtime):
    graph = Graph(write_graph(tmp_path / "model.onnx"), runtime)
    expected = graph(PIXELS)
    np.testing.assert_array_equal(copy.deepcopy(graph)(PIXELS), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(graph))(PIXELS), expected)
    with ThreadPoolExecutor(4) as pool:
        rows = pool.map(lambda index: graph(PIXELS[index % 5 : index % 5 + 1]), range(40))
        np.testing.assert_allclose(np.concatenate([*rows]), np.tile(EXPECTED, 8), atol=1e-5)
    if runtime == "onnxruntime" and hasattr(os, "fork"):
        forked = multiprocessing.get_context("fork")
        queue = forked.SimpleQueue()
        child = forked.Process(target=lambda: queue.put(graph(PIXELS)))
        child.start()
        np.testing.assert_array_equal(queue.get(), expected)
        child.join()


def test_a_graph_of_floats_is_given_normalized_pixels(tmp_path):
    graph = Graph(write_graph(tmp_path / "model.onnx", dtype="float32", weight=3.0, bias=0.0))
    fitted = Preprocessing(8, "squash", (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    expert = GraphExpert(graph, fitted, "mean", scale=2.0, offset=0.5)
    mean = np.array(fitted.mean).reshape(1, 3, 1, 1)
    expected = ((PIXELS / 255 - mean) / 0.2).mean(axis=(1, 2, 3)) * 3 * 2 + 0.5
    logits = expert(torch.from_numpy(PIXELS))
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"inputs of 8 px, not of 16 px"):
        GraphExpert(graph, Preprocessing(16, "squash", fitted.mean, fitted.std), "mean")
    with pytest.raises(UserError, match="a map needs an expert in PyTorch"):
        require_trained(expert, "a map")


@each_runtime
@pytest.mark.parametrize("location", ["../secret.bin", "link.bin", "absolute"])
def test_weights_outside_the_folder_are_refused(tmp_path, runtime, location):
    (tmp_path / "secret.bin").write_bytes(np.float32(1).tobytes())
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "link.bin").symlink_to("../secret.bin")
    outside = str(tmp_path / "secret.bin") if location == "absolute" else location
    with pytest.raises(UserError, match=f"cannot be loaded by {runtime}"):
        Graph(write_graph(folder / "model.onnx", outside=outside), runtime)


@each_runtime
def test_bad_files_are_one_line(tmp_path, runtime):
    whole = write_graph(tmp_path / "model.onnx").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\xff" * 100):
        path = tmp_path / "bad.onnx"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot be loaded by {runtime}") as caught:
            Graph(path, runtime)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        Graph(tmp_path / "none.onnx", runtime)
    with pytest.raises(UserError, match=r"must be images \(N, 3, S, S\)"):
        Graph(write_graph(tmp_path / "gray.onnx", channels=1), runtime)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    path = write_graph(tmp_path / "model.onnx")
    monkeypatch.setattr(graph_module, "RUNTIMES", ("onnxruntime", "no_such_runtime"))
    with pytest.raises(UserError, match=r'no_such_runtime is not installed; run pip install "\.\[export'):
        Graph(path, "no_such_runtime")
