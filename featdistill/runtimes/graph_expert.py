"""A graph with the interface of an expert, as far as scoring needs it."""

import numpy as np
import torch
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.data.preprocessing import Preprocessing
from featdistill.models.encoders import BackboneSpec
from featdistill.runtimes.graph import Graph


class GraphExpert(nn.Module):
    """Images in, one logit per image out, computed by a graph on the CPU.

    A graph whose input is uint8 gets the pixels; any other gets them normalized as `preprocessing` says.

    Args:
        graph: its output is one number per image.
        preprocessing: how images become inputs, as for an expert.
        name: of what the graph computes, for people to read.
        scale, offset: the logit is `scale` times the output, plus `offset`.

    Raises:
        UserError: the preprocessing has another size than the graph's input.
    """

    def __init__(
        self, graph: Graph, preprocessing: Preprocessing, name: str, scale: float = 1.0, offset: float = 0.0
    ) -> None:
        super().__init__()
        self.graph, self.preprocessing, self.scale, self.offset = graph, preprocessing, scale, offset
        size = graph.shape[2]
        if preprocessing.sizes or size not in (None, preprocessing.size):
            raise UserError(f"{graph.path} has inputs of {size} px, not of {preprocessing.span}")
        self.spec = BackboneSpec(graph.runtime, name, input_size=preprocessing.size)
        for key in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, key)).view(3, 1, 1)
            self.register_buffer(key, values, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B,) float32 of images (B, 3, S, S) uint8."""
        if self.graph.dtype != np.uint8:
            images = (images / 255 - self.mean) / self.std
        return torch.from_numpy(self.graph(images.numpy())) * self.scale + self.offset


def require_trained(expert: nn.Module, what: str) -> None:
    """Raise a `UserError` if an expert is a graph, which has neither weights nor layers to look into."""
    if isinstance(expert, GraphExpert):
        path = expert.graph.path
        raise UserError(f"{what} needs an expert in PyTorch; {path} is a graph, which only gives scores")
