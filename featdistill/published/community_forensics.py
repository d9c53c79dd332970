"""Community Forensics (Park and Owens, CVPR 2025): a ViT-S/16 trained on images of 4,803 generators.

Code and weights: MIT. Architecture, preprocessing and test protocol: github.com/JeongsooP/Community-Forensics
at 5ec815fb59bb46d4bcf4155bab1baea23337c4f9. One centered crop of the image, reduced or enlarged to 440 px
(224 px model: 256 px) on its shorter side; ImageNet's normalization, which timm's weights do not have.
"""

from featdistill.models.encoders import Backbone, BackboneSpec
from featdistill.models.expert import Expert
from featdistill.published.entry import Published, Source

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _make(backbone: Backbone, spec: BackboneSpec, resize: str) -> Expert:
    backbone.mean, backbone.std = _MEAN, _STD
    return Expert(backbone, spec, 0, 0.0, resize)


def _name_in_file(name: str) -> str:
    return name.replace("backbone.model.", "vit.").replace("head.1.", "vit.head.")


def _entry(size: int, resized: int, parameters: int, revision: str, sha256: str) -> Published:
    return Published(
        f"Community Forensics, ViT-S/16 at {size} px",
        "MIT",
        Source("huggingface.co", f"OwensLab/commfor-model-{size}", revision, "model.safetensors"),
        parameters,
        BackboneSpec("timm", f"vit_small_patch16_{size}", "augreg_in21k_ft_in1k", input_size=size),
        f"bilinear:{resized}",
        has_backbone=True,
        make=_make,
        name_in_file=_name_in_file,
        sha256=sha256,
    )


DETECTORS = {
    "commfor_384": _entry(
        384,
        440,
        21_811_969,
        "6076002bf0d9dd37537f965ee2f06f826c333b61",
        "b89f36275f3bf5e2b040eee36597a8f19db051bff9a473a9cf7b2466284fb387",
    ),
    "commfor_224": _entry(
        224,
        256,
        21_666_049,
        "26afc31e6b40c312c3fd42c05a758be62446215b",
        "a6cc439d5a6d2dfadd60c77d27a2838ad55b34e601ecd30f46ad97266d6ac4e0",
    ),
}
