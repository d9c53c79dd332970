"""The authors' released experts: `Expert_1_clip.pth` and the like become experts of ours.

    python -m featdistill convert weights/ --out experts/

The folder has the files and their `manifest.json` (see `released_files`). Every file is compared with the
manifest before it is read, and is read with `weights_only=True`. The command converts each file into an
expert folder, once; `read_released` loads the experts directly.

The names in a file are those of transformers' `CLIPVisionModelWithProjection` or `SiglipVisionModel`, which
tell the two apart; ours are timm's. Sizes are those of the tensors, except the number of attention heads: the
manifest's `num_heads`, or by default width / 64 (CLIP) or 16 (SigLIP). The released head has two classes, the
second of which is AI-generated; ours has their difference.
"""

import dataclasses
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featdistill.command_line import UserError
from featdistill.models import released_files
from featdistill.models.backbones import BACKBONES, build
from featdistill.models.encoders import BackboneSpec
from featdistill.models.expert import CARD_FILE, WEIGHTS_FILE, Expert, read_card, save_expert
from featdistill.models.released_files import ReleasedFile, ReleasedTensors

_log = logging.getLogger(__name__)

_LICENSE = "The authors gave no license with these weights."
# Of the release: dropout before the last layer of the head.
_HEAD_DROPOUT = 0.3
# Sizes of transformers' ViT-L/14 and So400M/14 towers and of timm's models of those names.
_CLIP_SIZES = {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0}
_CLIP_SIZES |= {"num_classes": 768}
_SIGLIP_SIZES = {"patch_size": 14, "embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362}
# Beginnings of keys that only one of the two has.
_CLIP_KEYS = ("embeddings.class_embedding", "pre_layrnorm.", "visual_projection.")
_SIGLIP_KEYS = ("head.",)
# timm's names, as patterns, and what they become in transformers, one after the other.
_NAMES = (
    (r"^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm_pre\.", "pre_layrnorm."),
    (r"^norm\.", "post_layernorm."),
    (r"^head\.", "visual_projection."),
    (r"^attn_pool\.latent$", "head.probe"),
    (r"^attn_pool\.q\.", "head.attention.in_proj_"),
    (r"^attn_pool\.proj\.", "head.attention.out_proj."),
    (r"^attn_pool\.norm\.", "head.layernorm."),
    (r"^attn_pool\.mlp\.", "head.mlp."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.attn\.qkv\.", ".self_attn.{}_proj."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


def read_released(folder: str | Path) -> dict[str, Expert]:
    """Load the authors' experts in evaluation mode, on the CPU, in float32.

    Args:
        folder: has `manifest.json` and the files it lists.

    Returns:
        Experts by the names of their files without `.pth`, in the manifest's order.

    Raises:
        UserError: a file is missing, differs from the manifest, or does not have exactly the weights of an
            expert.
    """
    files = released_files.read_manifest(folder)
    released_files.verify(files.values())
    return {name: read_file(file) for name, file in files.items()}


def released_hashes(folder: str | Path) -> dict[str, str]:
    """Return the manifest's SHA-256 of each file, which `read_released` verifies, by the expert's name."""
    return {name: file.sha256 for name, file in released_files.read_manifest(folder).items()}


def read_file(file: ReleasedFile) -> Expert:
    """Turn one released file into an expert of ours; see `read_released`."""
    source = ReleasedTensors(file.path)
    spec = read_spec(source, file.num_heads)
    # Without memory of its own: the weights of the file replace the new ones.
    with torch.device("meta"):
        backbone = build(spec)
    hidden = source.shape("classifier.0.bias", 1)[0]
    expert = Expert(backbone, spec, hidden, _HEAD_DROPOUT)
    state = {f"backbone.model.{key}": value for key, value in _tower(source, backbone.model).items()}
    state["head.0.weight"] = source.take("classifier.0.weight", hidden, backbone.feature_dim)
    state["head.0.bias"] = source.take("classifier.0.bias", hidden)
    for kind, shape in (("weight", (2, hidden)), ("bias", (2,))):
        # The softmax over two classes equals the sigmoid of their difference.
        real, ai = source.take(f"classifier.3.{kind}", *shape).split(1)
        state[f"head.3.{kind}"] = ai - real
    source.finish()
    expert.load_state_dict(state, strict=True, assign=True)
    return expert.to(memory_format=torch.channels_last).eval()


def read_spec(source: ReleasedTensors, num_heads: int | None = None) -> BackboneSpec:
    """Tell CLIP from SigLIP by the keys, and read the sizes from the shapes.

    Args:
        num_heads: number of attention heads, if known.

    Returns:
        The specification, with what differs from the full size as its options.

    Raises:
        UserError: a tensor that shows a size is missing, or the sizes are not those of an image tower.
    """
    if not source.has(_CLIP_KEYS + _SIGLIP_KEYS):
        raise UserError(f"{source.path} is not a released expert: its keys are neither CLIP's nor SigLIP's")
    is_clip = source.has(_CLIP_KEYS)
    base, full = (
        BACKBONES["clip_l14" if is_clip else "siglip_so400m"],
        _CLIP_SIZES if is_clip else _SIGLIP_SIZES,
    )
    width, hidden = source.length("layer_norm1.bias"), source.length("mlp.fc1.bias")
    patch_px = source.shape("embeddings.patch_embedding.weight", 4)[-1]
    size_px = _grid(source, prefix_tokens=1 if is_clip else 0) * patch_px
    heads = num_heads or (width / 64 if is_clip else full["num_heads"])
    if heads != int(heads) or width % heads:
        raise UserError(
            f"{source.path}: {width} channels do not divide into {heads:g} heads; add num_heads to "
            f"{released_files.MANIFEST_FILE}"
        )
    # timm rounds width x ratio down.
    ratio = hidden / width if hidden % width == 0 else (hidden + 0.5) / width
    sizes: dict[str, Any] = {
        "patch_size": patch_px,
        "embed_dim": width,
        "depth": source.count_layers(),
        "num_heads": int(heads),
        "mlp_ratio": full["mlp_ratio"] if int(width * full["mlp_ratio"]) == hidden else ratio,
    }
    if is_clip:
        sizes["num_classes"] = source.shape("visual_projection.weight", 2)[0]
    else:
        # SigLIP's patches leave a margin (27 x 14 = 378 of 384 px); its input sizes are multiples of 32.
        multiple_px = -(-size_px // 32) * 32
        size_px = multiple_px if multiple_px < size_px + patch_px else size_px
    options = base.options | {key: value for key, value in sizes.items() if value != full[key]}
    return dataclasses.replace(base, input_size=size_px, options=options)


def _grid(source: ReleasedTensors, prefix_tokens: int) -> int:
    """Return the number of patches along a side."""
    name = "embeddings.position_embedding.weight"
    shape = source.shape(name, 2)
    grid = math.isqrt(max(shape[0] - prefix_tokens, 0))
    if grid == 0 or grid**2 != shape[0] - prefix_tokens:
        raise UserError(f"{source.path}: {source.key(name)} is {shape}, not a square of patches")
    return grid


def _tower(source: ReleasedTensors, model: nn.Module) -> dict[str, Tensor]:
    """Take the weights of a timm model out of a file, under timm's names and with its shapes."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        shape, name = tuple(value.shape), key
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if key == "head.bias":  # timm's layer has a bias, the release's projection does not
            state[key] = torch.zeros(shape)
        elif ".qkv." in key:
            third = (shape[0] // 3, *shape[1:])
            state[key] = torch.cat([source.take(name.format(part), *third) for part in "qkv"])
        elif key.startswith("attn_pool.q."):  # query, key and value are one tensor in the file
            parts = source.take(name, 3 * shape[0], *shape[1:]).split([shape[0], 2 * shape[0]])
            state[key], state[key.replace(".q.", ".kv.")] = (part.clone() for part in parts)
        elif not key.startswith("attn_pool.kv."):
            batch_sides = {"pos_embed": 1, "cls_token": 2}.get(key, 0)
            state[key] = source.take(name, *shape[batch_sides:]).view(shape)
    return state


def convert(folder: str | Path, out: str | Path) -> None:
    """Write an expert folder for each released file, unless it was made from the same file before.

    Raises:
        UserError: see `read_released`; or a folder of the same name has other content.
    """
    files = released_files.read_manifest(folder)
    missing = {name: file for name, file in files.items() if not _is_made_from(Path(out) / name, file)}
    released_files.verify(missing.values())
    for name, file in files.items():
        if name in missing:
            released = {"file": file.path.name, "sha256": file.sha256, "licence": _LICENSE}
            save_expert(read_file(file), Path(out) / name, {"released": released})
        _log.info(
            f"{Path(out) / name}: {'written' if name in missing else 'already up to date'}, from {file.path}"
        )
    _log.info(_LICENSE)


def _is_made_from(target: Path, file: ReleasedFile) -> bool:
    if not target.exists():
        return False
    released = read_card(target).get("released") if (target / CARD_FILE).is_file() else None
    if not isinstance(released, dict):
        raise UserError(f"{target} exists and is not a converted expert; choose another --out, or remove it")
    return released.get("sha256") == file.sha256 and (target / WEIGHTS_FILE).is_file()
