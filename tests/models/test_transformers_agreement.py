"""Released files against the library whose names they have: transformers' towers and ours give the same.

At the released sizes it takes some minutes and 6 GB of memory: FEATDISTILL_FULL_SIZE=1 pytest THIS_FILE.
"""

import os
from typing import NamedTuple

import pytest
import torch
from released_folders import write_release
from torch import Tensor, nn

from featdistill.models.released import read_released

transformers = pytest.importorskip("transformers", reason="transformers, which wrote the names, is missing")
full_size = pytest.mark.skipif(
    os.environ.get("FEATDISTILL_FULL_SIZE") != "1",
    reason="takes some minutes and 6 GB of memory: run with the environment variable FEATDISTILL_FULL_SIZE=1",
)


class Outputs(NamedTuple):
    feature: Tensor
    tokens: Tensor
    logit: Tensor


def make_tower(kind: str, sizes: dict) -> nn.Module:
    """A tower of transformers, as the release builds it, with random weights and biases."""
    torch.manual_seed(5)
    if kind == "clip":
        tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes))
    else:
        tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    for parameter in tower.parameters():
        # Fresh biases are 0, norms 1 and weights small, which would hide some that are exchanged.
        is_vector = parameter.ndim == 1
        mean, std = (parameter.mean().item(), 0.1) if is_vector else (0.0, parameter[0].numel() ** -0.5)
        nn.init.normal_(parameter, mean, std)
    return tower.eval()


@torch.inference_mode()
def run_tower(tower: nn.Module, classifier: nn.Module, images: Tensor) -> Outputs:
    output = tower(pixel_values=images)
    if hasattr(output, "image_embeds"):
        inner = getattr(tower, "vision_model", tower)
        feature, tokens = output.image_embeds, inner.post_layernorm(output.last_hidden_state)[:, 1:]
    else:
        feature, tokens = output.pooler_output, output.last_hidden_state
    real, ai = classifier(feature).unbind(1)
    return Outputs(feature, tokens, ai - real)


def assert_agreement(folder, kind: str, sizes: dict, num_heads: int | None = None) -> None:
    tower = make_tower(kind, sizes)
    width = sizes.get("projection_dim", sizes["hidden_size"])
    classifier = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 2)).eval()
    state = {f"vision_encoder.{key}": value for key, value in tower.state_dict().items()}
    state |= {f"classifier.{key}": value for key, value in classifier.state_dict().items()}
    entry = {"num_heads": num_heads} if num_heads else {}
    write_release(folder, {"a.pth": {"model_state_dict": state}}, **entry)
    images = torch.rand(1, 3, sizes["image_size"], sizes["image_size"])
    (expert,) = read_released(folder).values()
    (folder / "a.pth").unlink()
    assert expert.preprocessing.size == sizes["image_size"]
    expected = run_tower(tower, classifier, (images - expert.mean) / expert.std)
    with torch.inference_mode():
        found = expert.encode(images)
    for name, ours, theirs in (
        ("feature", found.feature, expected.feature),
        ("tokens", found.tokens[-1], expected.tokens),
        ("logit", found.logit, expected.logit),
    ):
        distance = (ours - theirs).abs().max().item()
        print(
            f"{kind} {sizes['hidden_size']}: {name} up to {theirs.abs().max():.2g} agrees to {distance:.1e}"
        )
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_narrow_clip_agrees(tmp_path):
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 6}
    sizes |= {"image_size": 70, "patch_size": 14, "projection_dim": 40}
    assert_agreement(tmp_path, "clip", sizes, num_heads=6)


def test_a_narrow_siglip_agrees(tmp_path):
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 16}
    assert_agreement(tmp_path, "siglip", sizes | {"image_size": 64, "patch_size": 14})


@full_size
def test_the_full_size_clip_agrees(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    sizes |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 768}
    assert_agreement(tmp_path, "clip", sizes)


@full_size
def test_the_full_size_siglip_agrees(tmp_path):
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    sizes |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    assert_agreement(tmp_path, "siglip", sizes)
