"""ClipDet (Cozzolino et al., CVPR Workshops 2024): a linear head on open_clip's CLIP ViT-L/14 of CommonPool.

Code and heads: Apache-2.0; github.com/grip-unina/ClipBased-SyntheticImageDetection at
c76ef7f5e158c5aba9e55b8b94ab0079720d281e. The head gets the class token before CLIP's projection, scaled to
length 1, of the middle of the image, whose shorter side is brought to 224 px.
"""

import torch
from torch import Tensor, nn

from featdistill.models.encoders import Backbone, BackboneSpec
from featdistill.models.expert import Expert
from featdistill.published.entry import Published, Source


class UnitLength(nn.Module):
    """Scales features (B, D) to length 1."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.nn.functional.normalize(features, dim=-1)


def _make(backbone: Backbone, spec: BackboneSpec, resize: str) -> Expert:
    expert = Expert(backbone, spec, 0, 0.0, resize)
    expert.head[0] = UnitLength()
    return expert


def _name_in_file(name: str) -> str | None:
    return name.replace("head.1.", "fc.") if name.startswith("head.") else None


def _entry(trained_on: str, sha256: str) -> Published:
    return Published(
        f"ClipDet {trained_on}, CLIP ViT-L/14 of CommonPool",
        "Apache-2.0",
        Source(
            "github.com",
            "grip-unina/ClipBased-SyntheticImageDetection",
            "c76ef7f5e158c5aba9e55b8b94ab0079720d281e",
            f"weights/clipdet_{trained_on}/weights.pth",
        ),
        1025,
        BackboneSpec("open_clip", "ViT-L-14", "commonpool_xl_s13b_b90k", "pool", input_size=224),
        "bicubic:224",
        has_backbone=False,
        make=_make,
        name_in_file=_name_in_file,
        sha256=sha256,
    )


DETECTORS = {
    "clipdet_latent10k_plus": _entry(
        "latent10k_plus", "1c9c9f48a47d975bde67e9924983aa4e4ccda96a15e7e983b6305f0c56d9ee18"
    ),
    "clipdet_latent10k": _entry(
        "latent10k", "04b022c6990709acb132337d7e432fc57090cec9db3869577111b031d40c19f9"
    ),
}
