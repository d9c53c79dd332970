"""Experts and their fusion as one ONNX file: pixels in, the logit of the fused score out."""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from featdistill.inference.fusion import Fusion
from featdistill.models.expert import Expert
from featdistill.runtimes.graph import require

OPSET = 18
INPUT, OUTPUT = "images", "logit"
# A file of protobuf has at most 2 GiB; larger weights are a file of their own.
_MAX_BYTES = 1_900_000_000


class FusedExperts(nn.Module):
    """Images (N, 3, S, S) uint8 in, logits (N,) float32 of the fused score out.

    Args:
        experts: by name, with the same inputs, in evaluation mode.
        fusion: see `Fusion.apply`, which this computes in float32, without probabilities that round to 1.
    """

    def __init__(self, experts: dict[str, Expert], fusion: Fusion) -> None:
        super().__init__()
        fusion.check([*experts])
        self.experts, self.method = nn.ModuleList(experts.values()), fusion.method
        temperature, weights = fusion.temperature or {}, fusion.weights or {}
        self.temperatures = [temperature.get(name, 1.0) for name in experts]
        self.weights = [weights.get(name, 1 / len(experts)) for name in experts]

    def forward(self, images: Tensor) -> Tensor:
        scaled = zip(self.experts, self.temperatures, self.weights, strict=True)
        parts = [(expert(images) / temperature, weight) for expert, temperature, weight in scaled if weight]
        if self.method == "logit_mean" or len(parts) == 1:
            return sum(logit * weight for logit, weight in parts)
        ai = torch.stack([logsigmoid(logit) + math.log(weight) for logit, weight in parts])
        real = torch.stack([logsigmoid(-logit) + math.log(weight) for logit, weight in parts])
        return ai.logsumexp(dim=0) - real.logsumexp(dim=0)


def write_onnx(experts: dict[str, Expert], fusion: Fusion, path: Path) -> None:
    """Write the graph of experts with the same inputs; it accepts any number of images."""
    require("onnxscript")
    size = next(iter(experts.values())).preprocessing.size
    module = FusedExperts(experts, fusion).eval()
    images = torch.zeros((2, 3, size, size), dtype=torch.uint8)
    with torch.inference_mode(False), quiet(), _plain_attention():
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    weights = sum(value.nbytes for value in module.state_dict().values())
    program.save(str(path), external_data=weights > _MAX_BYTES)


def block_modules(experts: dict[str, Expert]) -> set[str]:
    """Return the names, in the traced file, of all modules with parameters in the blocks of the backbones."""
    return {
        f"experts.{number}.backbone.{parameter.rpartition('.')[0]}"
        for number, expert in enumerate(experts.values())
        for layer in expert.backbone.layers()[1:-1]
        for parameter in layer
    }


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Let PyTorch's attention compute in operations that ONNX has, not in one of its own."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence messages to the developers of an exporter."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
