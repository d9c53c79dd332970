"""Folders of released experts of the tests' own: tiny CLIP and SigLIP towers with random weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featdistill import atomic


def write_release(folder: Path, contents: dict[str, Any], **entry: Any) -> Path:
    """Write each content as a file of that name, and the manifest; `entry` is added to the entry of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        torch.save(content, folder / name)
    return write_manifest(folder, **entry)


def write_manifest(folder: Path, **entry: Any) -> Path:
    """Write the manifest of the files that a folder has."""
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": atomic.sha256_of(path), **entry}
        for path in sorted(folder.glob("*.pth"))
    }
    atomic.write_json(folder / "manifest.json", {"schema_version": 1, "files": files})
    return folder


def clip_shapes(
    width: int = 32, hidden: int = 64, depth: int = 2, positions: int = 5, projection: int = 24
) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a CLIP expert's file."""
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": (positions, width),
        **_pair("pre_layrnorm", width),
        **_layers(width, hidden, depth),
    }
    shapes = {f"vision_encoder.vision_model.{name}": shape for name, shape in shapes.items()}
    shapes["vision_encoder.visual_projection.weight"] = (projection, width)
    return shapes | _classifier(projection)


def siglip_shapes(
    width: int = 32, hidden: int = 64, depth: int = 2, positions: int = 4
) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a SigLIP expert's file."""
    shapes = {
        **_pair("embeddings.patch_embedding", width, 3, 14, 14),
        "embeddings.position_embedding.weight": (positions, width),
        **_layers(width, hidden, depth),
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        **_pair("head.attention.out_proj", width, width),
        **_pair("head.layernorm", width),
        **_pair("head.mlp.fc1", hidden, width),
        **_pair("head.mlp.fc2", width, hidden),
    }
    shapes = {f"vision_encoder.vision_model.{name}": shape for name, shape in shapes.items()}
    return shapes | _classifier(width)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return a state dict of those shapes."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / 5 for name, shape in shapes.items()}


def _layers(width: int, hidden: int, depth: int) -> dict[str, tuple[int, ...]]:
    shapes = _pair("post_layernorm", width)
    for layer in range(depth):
        name = f"encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _pair(f"{name}.self_attn.{part}", width, width)
        shapes |= _pair(f"{name}.layer_norm1", width) | _pair(f"{name}.layer_norm2", width)
        shapes |= _pair(f"{name}.mlp.fc1", hidden, width) | _pair(f"{name}.mlp.fc2", width, hidden)
    return shapes


def _classifier(width: int) -> dict[str, tuple[int, ...]]:
    return _pair("classifier.0", 256, width) | _pair("classifier.3", 2, 256)


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
