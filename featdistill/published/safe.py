"""SAFE (Li et al., KDD 2025): the first half of a ResNet-50 on the diagonal detail of an image.

Code and weights: Apache-2.0; github.com/Ouxiang-Li/SAFE at 722620a6a6c1acae5bfbc580c9b0a295f64b7a87. It sees
the middle 256 px, not resized: the diagonal band (HH) of one level of the wavelet transform bior1.3, brought
back to 256 px. Its two outputs are real and fake; their softmax is the sigmoid of their difference.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from featdistill.models.encoders import Backbone, BackboneSpec
from featdistill.models.expert import Expert
from featdistill.models.timm_encoders import TimmBackbone
from featdistill.published.entry import Published, Source

_WIDTH = 512


def diagonal_detail(images: Tensor) -> Tensor:
    """Return the HH band of bior1.3 (one level, mirrored at the borders), resized to the images' size.

    The high-pass filter of bior1.3 is the difference of two neighbors, so the band has a closed form.

    Args:
        images: (B, 3, H, W) float.
    """
    rows, columns = (_mirrored(side, images.device) for side in images.shape[-2:])
    pairs = images[..., rows, :]
    pairs = pairs[..., 0::2, :] - pairs[..., 1::2, :]
    pairs = pairs[..., columns]
    band = 0.5 * (pairs[..., 0::2] - pairs[..., 1::2])
    return interpolate(band, images.shape[-2:], mode="bilinear", align_corners=False)


def _mirrored(side: int, device: torch.device) -> Tensor:
    """Return the positions of the pixels that the transform pairs up along a side, two before its first."""
    positions = torch.arange(-2, 2 * ((side + 5) // 2) - 2, device=device)
    positions = torch.where(positions < 0, -1 - positions, positions)
    return torch.where(positions < side, positions, 2 * side - 1 - positions)


class SafeExpert(Expert):
    """An expert whose backbone receives the diagonal detail, computed in float32."""

    def normalized(self, images: Tensor) -> Tensor:
        images = images / 255 if images.dtype == torch.uint8 else images
        return super().normalized(diagonal_detail(images.float()))


def _make(backbone: Backbone, spec: BackboneSpec, resize: str) -> Expert:
    network = backbone.model
    network.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    network.layer3 = network.layer4 = nn.Identity()
    network.feature_info = network.feature_info[:3]
    network.num_features = network.head_hidden_size = _WIDTH
    cut = TimmBackbone(network, "pool", backbone.input_size, (0.0,) * 3, (1.0,) * 3)
    expert = SafeExpert(cut, spec, 0, 0.0, resize)
    difference = nn.Linear(2, 1, bias=False)
    difference.weight = nn.Parameter(torch.tensor([[-1.0, 1.0]]))
    expert.head = nn.Sequential(nn.Linear(_WIDTH, 2), difference)
    return expert


def _name_in_file(name: str) -> str | None:
    if name == "head.1.weight":
        return None
    return name.replace("backbone.model.", "").replace("head.0.", "fc1.")


DETECTORS = {
    "safe": Published(
        "SAFE, half a ResNet-50",
        "Apache-2.0",
        Source(
            "github.com",
            "Ouxiang-Li/SAFE",
            "722620a6a6c1acae5bfbc580c9b0a295f64b7a87",
            "checkpoint/checkpoint-best.pth",
        ),
        1_438_274,
        BackboneSpec("timm", "resnet50", input_size=256),
        "pad",
        has_backbone=True,
        make=_make,
        name_in_file=_name_in_file,
        git_blob="21e7aceb520a44ffcdf09234aae8f02b5986f80a",
    )
}
