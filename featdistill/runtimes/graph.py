"""One graph file in memory: images in, one number per image out."""

import importlib
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from featdistill.command_line import UserError, one_of

RUNTIMES = ("onnxruntime", "openvino")


def openvino_settings(precision: str = "f32", group: int = 0) -> dict[str, Any]:
    """Return settings of OpenVINO, which without them computes in bfloat16 where the processor can.

    Args:
        precision: arithmetic of what is not 8-bit: `f32`, or `bf16` on processors that have it.
        group: values that are rounded to 8 bits with one scale where weights are 8-bit; 0 to round nothing.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }


_DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


def require(package: str) -> ModuleType:
    """Return a package of the extra `export`, or raise a `UserError` that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'{package} is not installed; run pip install ".[export]" in a checkout') from error


class Graph:
    """A graph with one input (N, 3, S, S) and one output (N,) or (N, 1), run on the CPU.

    Any number of threads may call it. A copy, and a process that was forked, load the file again.

    Attributes:
        input_name: name of its input.
        dtype: NumPy type of its input.
        shape: of its input; None where any length fits.

    Args:
        path: an ONNX file, or with `openvino` also an `.xml` file.
        runtime: one of `RUNTIMES`.
        threads: that compute; as many as PyTorch has by default.
        settings: of OpenVINO, see `openvino_settings`.

    Raises:
        UserError: the package is not installed, or the file is missing, damaged, refers to files outside its
            folder, or has other inputs and outputs.
    """

    def __init__(
        self,
        path: str | Path,
        runtime: str = "onnxruntime",
        threads: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.runtime = Path(path), one_of("runtime", runtime, RUNTIMES)
        self.threads = threads or torch.get_num_threads()
        self.settings = settings or openvino_settings()
        self._lock = threading.Lock()
        self._open()
        if len(self.shape) != 4 or self.shape[1] != 3 or self.shape[2] != self.shape[3]:
            raise UserError(f"the input of {path} is {self.shape}; it must be images (N, 3, S, S)")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the outputs (N,) float32 for images (N, 3, S, S) of the type `dtype`.

        Where the graph has a fixed N, the images are run in parts of this size.

        Raises:
            UserError: the graph does not return one number per image.
        """
        if self._process != os.getpid():
            self._open()
        count, step = len(images), self.shape[0] or max(1, len(images))
        parts = [self._run(_filled(images[first : first + step], step)) for first in range(0, count, step)]
        if any(part.size != step for part in parts):
            raise UserError(f"{self.path} does not return one number per image")
        values = [part.reshape(step) for part in parts]
        return np.concatenate(values, dtype=np.float32)[:count] if values else np.zeros(0, np.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_session", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _process=None, _lock=threading.Lock())

    def _open(self) -> None:
        package = require(self.runtime)
        if not self.path.is_file():
            raise UserError(f"graph {self.path} does not exist")
        open_ = self._open_onnxruntime if self.runtime == "onnxruntime" else self._open_openvino
        try:
            open_(package)
        except Exception as error:  # each runtime has types of its own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self.path} cannot be loaded by {self.runtime}: {reason}") from error
        self._process = os.getpid()

    def _open_onnxruntime(self, onnxruntime: ModuleType) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors
        # Waiting threads would spin on cores that the loader's processes need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        (images,), (_,) = session.get_inputs(), session.get_outputs()
        self.input_name, self.dtype = images.name, _DTYPES[images.type]
        self.shape = tuple(length if isinstance(length, int) else None for length in images.shape)
        self._session = session

    def _open_openvino(self, openvino: ModuleType) -> None:
        settings = self.settings | {"INFERENCE_NUM_THREADS": self.threads}
        session = openvino.Core().compile_model(self.path, "CPU", settings)
        (images,), (_,) = session.inputs, session.outputs
        self.input_name, self.dtype = images.any_name, images.element_type.to_dtype().type
        self.shape = tuple(side.get_length() if side.is_static else None for side in images.partial_shape)
        self._session = session

    def _run(self, images: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(images, self.dtype)
        if self.runtime == "onnxruntime":
            return self._session.run(None, {self.input_name: images})[0]
        with self._lock:  # a compiled model has one request, whose output the next one overwrites
            return self._session(images)[0].copy()


def _filled(images: np.ndarray, count: int) -> np.ndarray:
    """Return `count` images, the last one repeated where there are fewer."""
    return images if len(images) == count else images[np.minimum(np.arange(count), len(images) - 1)]
