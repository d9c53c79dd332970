"""The plain way to score with the paper's ensemble, that of the authors' release; ours is compared with it.

One image after the other is decoded and resized with Pillow (bicubic, shorter side, centre crop) and becomes
a normalised float32 tensor; the towers are transformers' with float32 weights under fp16 autocast (on a CPU
without), each with a head of two classes; images are prepared and scored in turns, in one process. An image
is decoded once and prepared once for all experts that take the same input.

Weights are random. Where transformers is not installed, or does not have a backbone, the expert's own
backbone takes the tower's place, in float32.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.device import step_s_within
from featdistill.models.backbones import BACKBONES, BackboneSpec
from featdistill.models.expert import Expert

try:
    import transformers
except ImportError:
    transformers = None

# The configurations of openai/clip-vit-large-patch14 and google/siglip-so400m-patch14-384.
_CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP |= {"image_size": 224, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu"}
_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
_SIGLIP |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14}


class PillowInput(NamedTuple):
    """What one kind of expert takes: the side of a square in px, and its normalisation."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def pillow_tensors(path: str, inputs: Sequence[PillowInput]) -> list[Tensor]:
    """Decode an image with Pillow and return a normalised (3, S, S) float32 for each input."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    tensors = []
    for size, mean, std in inputs:
        width, height = picture.size
        shorter = min(width, height)
        resized = picture.resize(
            (size * width // shorter, size * height // shorter), Image.Resampling.BICUBIC
        )
        left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
        square = np.array(resized.crop((left, top, left + size, top + size)))
        pixels = torch.from_numpy(square).permute(2, 0, 1).contiguous().float().div(255)
        tensors.append((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    return tensors


class PlainExpert(nn.Module):
    """A tower and the release's head; (B, 3, S, S) float32 in, P(AI) (B,) out."""

    def __init__(self, encoder: nn.Module, feature: Callable[[Any], Tensor], width: int) -> None:
        """Take what `feature` picks of the encoder's output, which is `width` wide."""
        super().__init__()
        self.encoder, self.feature = encoder, feature
        self.classifier = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.feature(self.encoder(images))).softmax(-1)[:, 1]


class ReleasedWay:
    """The ensemble as the release would run it.

    Attributes:
        towers: where each expert's tower is from, in words.
    """

    def __init__(self, experts: Sequence[Expert], device: torch.device) -> None:
        """Build a counterpart of each expert, with random weights."""
        self.device = device
        needed = [PillowInput(e.preprocessing.size, e.backbone.mean, e.backbone.std) for e in experts]
        self.inputs = list(dict.fromkeys(needed))
        self._places = [self.inputs.index(one) for one in needed]
        # Drawing the weights of a large tower takes long, and two of a kind may as well have the same.
        specs = [expert.spec for expert in experts]
        kinds = [specs.index(spec) for spec in specs]
        built = {kind: _tower(experts[kind]) for kind in set(kinds)}
        self.towers = [built[kind][0] for kind in kinds]
        copies = [copy.deepcopy(built[kind][1]) for kind in kinds]
        self._models = [plain.float().eval().to(device) for plain in copies]

    def end_to_end(self, paths: Sequence[str], batch_size: int, seconds: float) -> float:
        """Return images a second from files, measured for some seconds after one batch."""
        endless = cycle(paths)
        self._score(self._prepare(list(islice(endless, batch_size))))
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            self._score(self._prepare(list(islice(endless, batch_size))))
            done += batch_size
        return done / (time.perf_counter() - start)

    def model_only(self, batch_size: int, seconds: float) -> float:
        """Return images a second of float32 batches that lie on the device."""
        batches = [torch.randn(batch_size, 3, one.size, one.size, device=self.device) for one in self.inputs]
        return batch_size / step_s_within(lambda: self._forward(batches), self.device, seconds)

    def _prepare(self, paths: list[str]) -> list[Tensor]:
        images = [pillow_tensors(path, self.inputs) for path in paths]
        return [torch.stack(of_input).to(self.device) for of_input in zip(*images, strict=True)]

    def _score(self, batches: list[Tensor]) -> list[float]:
        return torch.stack(self._forward(batches)).mean(0).tolist()

    def _forward(self, batches: list[Tensor]) -> list[Tensor]:
        is_gpu = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.float16, enabled=is_gpu):
            pairs = zip(self._models, self._places, strict=True)
            return [model(batches[place]) for model, place in pairs]


def _tower(expert: Expert) -> tuple[str, PlainExpert]:
    if transformers and _is(expert.spec, "clip_l14", 224):
        encoder = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**_CLIP))
        return "transformers' CLIP", PlainExpert(encoder, lambda output: output.image_embeds, 768)
    if transformers and _is(expert.spec, "siglip_so400m", 384):
        encoder = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_SIGLIP))
        return "transformers' SigLIP", PlainExpert(encoder, lambda output: output.pooler_output, 1152)
    return "our own backbone", PlainExpert(
        expert.backbone, lambda output: output[0], expert.backbone.feature_dim
    )


def _is(spec: BackboneSpec, name: str, size_px: int) -> bool:
    return dataclasses.replace(spec, input_size=None) == BACKBONES[name] and spec.input_size == size_px
