"""UniversalFakeDetect (Ojha et al., CVPR 2023): a linear head on OpenAI's CLIP ViT-L/14.

Code and head: MIT; github.com/WisconsinAIVision/UniversalFakeDetect at
76a0e3e60a8a06458707a625d269ba815a2e5919. The head gets CLIP's projected embedding, not normalized, of the
middle of the image, which is not resized.
"""

import dataclasses

from featdistill.models.backbones import BACKBONES
from featdistill.models.encoders import Backbone, BackboneSpec
from featdistill.models.expert import Expert
from featdistill.published.entry import Published, Source


def _make(backbone: Backbone, spec: BackboneSpec, resize: str) -> Expert:
    return Expert(backbone, spec, 0, 0.0, resize)


def _name_in_file(name: str) -> str | None:
    return name.removeprefix("head.1.") if name.startswith("head.") else None


DETECTORS = {
    "ufd": Published(
        "UniversalFakeDetect, CLIP ViT-L/14",
        "MIT",
        Source(
            "github.com",
            "WisconsinAIVision/UniversalFakeDetect",
            "76a0e3e60a8a06458707a625d269ba815a2e5919",
            "pretrained_weights/fc_weights.pth",
        ),
        769,
        dataclasses.replace(BACKBONES["clip_l14"], input_size=224),
        "pad",
        has_backbone=False,
        make=_make,
        name_in_file=_name_in_file,
        sha256="477100745713bcc957beb2b40859536859b6483fd6301b3b9293151b194c7847",
        golden_logit=4.1732936,
    )
}
