"""Experts with random weights, small enough for tests of what scores with them."""

from pathlib import Path

import torch

from featdistill.models.expert import create_expert, save_expert


def save_tiny_expert(
    folder: Path, backbone: str = "tiny_clip", size: int = 32, seed: int = 0, card: dict | None = None
) -> str:
    """Save an expert whose scores of different images differ clearly, and return its folder."""
    torch.manual_seed(seed)
    expert = create_expert(backbone, "random", input_size=size, head_hidden=8)
    with torch.no_grad():
        expert.head[3].weight.mul_(40)
    save_expert(expert.eval(), folder, card)
    return str(folder)


def save_tiny_pair(root: Path, card: dict | None = None) -> list[str]:
    """Save the experts alpha and beta, whose inputs differ in size, and return their folders."""
    pair = (("alpha", "tiny_clip", 48), ("beta", "tiny_siglip", 32))
    return [
        save_tiny_expert(root / name / "expert", backbone, size, seed, card)
        for seed, (name, backbone, size) in enumerate(pair)
    ]
