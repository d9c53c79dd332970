"""Scoring with the paper's ensemble as the authors' release does it; our engine is compared with this.

Images are decoded and resized one at a time with Pillow (bicubic, shorter side, center crop) and become
normalized float32 tensors. The encoders are transformers' with float32 weights under fp16 autocast (none on a
CPU), each with a head of two classes. Preparing and scoring alternate in one process; an image is decoded
once, and prepared once for all experts with the same input.

Weights are random. Where transformers is not installed, or does not have a backbone, the expert's own
backbone is used, in float32.
"""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

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
    """The input of one kind of expert: the side of a square in px, and its normalization."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@functools.cache
def pillow_transform(one: PillowInput) -> Callable[[Image.Image], Tensor]:
    """Return the function from a picture to a normalized (3, S, S) float32."""
    resize = transforms.Resize(one.size, transforms.InterpolationMode.BICUBIC)
    crop, normalize = transforms.CenterCrop(one.size), transforms.Normalize(one.mean, one.std)
    return transforms.Compose([resize, crop, transforms.ToTensor(), normalize])


def pillow_tensors(path: str, inputs: Sequence[PillowInput]) -> list[Tensor]:
    """Decode an image with Pillow and return a normalized (3, S, S) float32 for each input."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    return [pillow_transform(one)(picture) for one in inputs]


class PlainExpert(nn.Module):
    """An encoder and the release's head; (B, 3, S, S) float32 in, P(AI) (B,) out."""

    def __init__(self, encoder: nn.Module, feature: Callable[[Any], Tensor], width: int) -> None:
        """Classify what `feature` selects from the encoder's output, `width` values per image."""
        super().__init__()
        self.encoder, self.feature = encoder, feature
        self.classifier = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.feature(self.encoder(images))).softmax(-1)[:, 1]


class ReleasedEnsemble:
    """The ensemble as the release would run it.

    Attributes:
        encoders: a title for each expert's encoder.
    """

    def __init__(self, experts: Sequence[Expert], device: torch.device) -> None:
        """Build a counterpart of each expert, with random weights."""
        self.device = device
        needed = [PillowInput(e.preprocessing.size, e.backbone.mean, e.backbone.std) for e in experts]
        self.inputs = list(dict.fromkeys(needed))
        self._input_indices = [self.inputs.index(one) for one in needed]
        # Initializing a large encoder takes long, and two of a kind may as well have the same weights.
        specs = [expert.spec for expert in experts]
        kinds = [specs.index(spec) for spec in specs]
        built = {kind: _encoder(experts[kind]) for kind in set(kinds)}
        self.encoders = [built[kind][0] for kind in kinds]
        copies = [copy.deepcopy(built[kind][1]) for kind in kinds]
        self._models = [plain.float().eval().to(device) for plain in copies]

    def end_to_end(self, paths: Sequence[str], batch_size: int, seconds: float) -> float:
        """Return images per second from files, measured after one batch."""
        endless = cycle(paths)
        self._score(self._prepare(list(islice(endless, batch_size))))
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            self._score(self._prepare(list(islice(endless, batch_size))))
            done += batch_size
        return done / (time.perf_counter() - start)

    def model_only(self, batch_size: int, seconds: float) -> float:
        """Return images per second of float32 batches that are on the device."""
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
            pairs = zip(self._models, self._input_indices, strict=True)
            return [model(batches[index]) for model, index in pairs]


def _encoder(expert: Expert) -> tuple[str, PlainExpert]:
    if transformers and _is(expert.spec, "clip_l14", 224):
        encoder = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**_CLIP))
        return "transformers' CLIP", PlainExpert(encoder, lambda output: output.image_embeds, 768)
    if transformers and _is(expert.spec, "siglip_so400m", 384):
        encoder = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_SIGLIP))
        return "transformers' SigLIP", PlainExpert(encoder, lambda output: output.pooler_output, 1152)
    backbone = expert.backbone
    return "our own backbone", PlainExpert(backbone, lambda output: output[0], backbone.feature_dim)


def _is(spec: BackboneSpec, name: str, size_px: int) -> bool:
    return dataclasses.replace(spec, input_size=None) == BACKBONES[name] and spec.input_size == size_px
