"""Files with the keys and shapes of published detectors and random weights, and the published forward passes.

Written from the authors' code with torchvision, timm and open_clip alone.
"""

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms

from featdistill.published import loading

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# A small CLIP in place of ViT-L/14: width, blocks, attention heads, joint space.
WIDTH, DEPTH, HEADS, JOINT = 64, 3, 2, 24


def accept_random_weights(patch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    """Let a detector take a file with other values than the published ones."""
    entry = loading.DETECTORS[name]
    known = {"sha256", "git_blob", "golden_logit"} & {field.name for field in dataclasses.fields(entry)}
    patch.setitem(loading.DETECTORS, name, dataclasses.replace(entry, **dict.fromkeys(known), **changes))


def accept_small_clip(patch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    """The same, on a small CLIP."""
    spec = loading.DETECTORS[name].spec
    options = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    options |= {"num_classes": JOINT} if spec.feature == "projection" else {}
    accept_random_weights(patch, name, spec=dataclasses.replace(spec, options=options), **changes)


def commfor(size: int, path, **options: int) -> nn.Module:
    """Write a file of Community Forensics, and return its network."""
    torch.manual_seed(size)
    vit = timm.create_model(f"vit_small_patch16_{size}", num_classes=1, **options)
    nn.init.normal_(vit.head.weight, std=0.2)
    state = {f"vit.{key}": value.contiguous() for key, value in vit.state_dict().items()}
    safetensors.torch.save_file(state, path)
    return vit.eval()


def small_clip(path) -> nn.Module:
    """Write a file of a small CLIP as open_clip does, and return its image tower."""
    torch.manual_seed(2)
    visual = open_clip.transformer.VisionTransformer(
        224, 14, WIDTH, DEPTH, HEADS, 4.0, output_dim=JOINT, act_layer=open_clip.transformer.QuickGELU
    )
    for parameter in visual.parameters():  # also norms and biases
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    torch.save({f"visual.{key}": value for key, value in visual.state_dict().items()}, path)
    return visual.eval()


def rine_state(layers: int, dim: int, width: int = 1024, depth: int = 24) -> dict[str, torch.Tensor]:
    """Random values under RINE's keys."""
    shapes = {"alpha": (1, depth, dim), "head.6.weight": (1, dim), "head.6.bias": (1,)}
    for part, first in (("proj1", width), ("proj2", dim)):
        for number in range(layers):
            shapes[f"{part}.{1 + 3 * number}.weight"] = (dim, dim if number else first)
            shapes[f"{part}.{1 + 3 * number}.bias"] = (dim,)
    for number in (0, 3):
        shapes |= {f"head.{number}.weight": (dim, dim), f"head.{number}.bias": (dim,)}
    rng = torch.Generator().manual_seed(3)
    return {key: 0.3 * torch.randn(shape, generator=rng) for key, shape in shapes.items()}


def rine_logits(state: dict[str, torch.Tensor], visual: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """RINE's forward pass with hooks on `ln_2`, as published."""
    seen = []
    hooks = [
        block.ln_2.register_forward_hook(lambda _, __, output: seen.append(output[:, 0]))
        for block in visual.transformer.resblocks
    ]
    visual(images)
    for hook in hooks:
        hook.remove()

    def stack(values: torch.Tensor, part: str) -> torch.Tensor:
        for key in sorted({key.split(".")[1] for key in state if key.startswith(part)}, key=int):
            values = nn.functional.linear(values, state[f"{part}.{key}.weight"], state[f"{part}.{key}.bias"])
            values = values.relu() if (part, key) != ("head", "6") else values
        return values

    blended = (state["alpha"].softmax(dim=1) * stack(torch.stack(seen, dim=1), "proj1")).sum(dim=1)
    return stack(stack(blended, "proj2"), "head")[:, 0]


def clipdet(path, backbone_path, patch: pytest.MonkeyPatch, prefix: str) -> Callable:
    """Write a head of ClipDet and open_clip's file of a small CLIP; return the way from images to logits."""
    vision = {"image_size": 224, "layers": DEPTH, "width": WIDTH, "patch_size": 14, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": JOINT, "vision_cfg": vision, "text_cfg": text}
    patch.setitem(open_clip.factory._MODEL_CONFIGS, "small-clip", config)
    torch.manual_seed(4)
    clip = open_clip.create_model("small-clip")
    for parameter in clip.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    torch.save(clip.state_dict(), backbone_path)
    head = nn.Linear(WIDTH, 1)
    torch.save({"model": {f"{prefix}fc.{key}": value for key, value in head.state_dict().items()}}, path)
    clip.visual.proj = None
    clip.eval()
    return lambda images: head(clip.encode_image(images, normalize=True))[:, 0]


def safe(path) -> Callable:
    """Write a checkpoint of SAFE, and return the way from pixels in [0, 1] to two outputs."""
    torch.manual_seed(5)
    network = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3])
    network.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    network.layer3 = network.layer4 = network.fc = nn.Identity()
    network.fc1 = nn.Linear(512, 2)
    content = {"model": network.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "epoch": 19}
    torch.save(content | {"scaler": {"scale": 65536.0}, "args": argparse.Namespace(lr=1e-4)}, path)
    network.eval()

    def forward(images: torch.Tensor) -> torch.Tensor:
        return network.fc1(network(resized_band(images)))

    return forward


def wavelet_band(images: torch.Tensor) -> torch.Tensor:
    """The HH band of bior1.3, whose high-pass filter is (0, 0, -1, 1, 0, 0) / sqrt(2), as a convolution."""
    padded = np.pad(images.double().numpy(), ((0, 0), (0, 0), (4, 5), (4, 5)), mode="symmetric")
    taps = torch.tensor([0, 0, -1, 1, 0, 0], dtype=torch.float64) / 2**0.5
    kernel = torch.outer(taps, taps).expand(3, 1, 6, 6)
    return nn.functional.conv2d(torch.from_numpy(padded), kernel, stride=2, groups=3).float()


def resized_band(images: torch.Tensor) -> torch.Tensor:
    """What SAFE's network gets."""
    return transforms.Resize(images.shape[-2:])(wavelet_band(images))


def published_pixels(
    pictures: list[np.ndarray], size: int, resized: int | None, statistics: tuple, bicubic: bool = False
) -> torch.Tensor:
    """torchvision's transforms of the authors' test code, of images (H, W, 3) uint8."""
    how = transforms.InterpolationMode.BICUBIC if bicubic else transforms.InterpolationMode.BILINEAR
    steps = [transforms.Resize(resized, how)] if resized else []
    steps += [transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(*statistics)]
    prepared = transforms.Compose(steps)
    return torch.stack([prepared(Image.fromarray(picture)) for picture in pictures])
