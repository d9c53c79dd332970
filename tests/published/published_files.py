"""Files with the keys and shapes of published detectors and random weights, and the published forward passes.

Written from the authors' code with torchvision, timm and open_clip alone.
"""

import dataclasses

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
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
    changes |= {"sha256": None, "git_blob": None, "golden_logit": None}
    patch.setitem(loading.DETECTORS, name, dataclasses.replace(loading.DETECTORS[name], **changes))


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


def published_pixels(
    pictures: list[np.ndarray], size: int, resized: int | None, statistics: tuple
) -> torch.Tensor:
    """torchvision's transforms of the authors' test code, of images (H, W, 3) uint8."""
    steps = [transforms.Resize(resized)] if resized else []
    steps += [transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(*statistics)]
    prepared = transforms.Compose(steps)
    return torch.stack([prepared(Image.fromarray(picture)) for picture in pictures])
