"""The authors' released experts: `Expert_1_clip.pth` and its like become experts of ours.

    python -m featdistill convert weights/ --out experts/

The folder holds the files and their `manifest.json` (see `released_files`). Every file is held against it
before it is read, and is only ever read with `weights_only=True`. The command converts each file to an
expert's folder, once; `read_released` gives the experts without that.

A file has the names of transformers' `CLIPVisionModelWithProjection` or `SiglipVisionModel`, by which the two
are told apart; ours are timm's. Sizes are those of the tensors. The number of attention heads, which no shape
shows, is the manifest's `num_heads`, or else width / 64 (CLIP) or 16 (SigLIP). The head has two classes, of
which the second is AI-generated; ours has their difference.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featdistill.command_line import Parser, UserError
from featdistill.models.backbones import BACKBONES, BackboneSpec, build
from featdistill.models.expert import CARD_FILE, WEIGHTS_FILE, Expert, read_card, save_expert
from featdistill.models.released_files import (
    MANIFEST_FILE,
    ReleasedFile,
    ReleasedTensors,
    read_manifest,
    verify,
)

_LICENCE = "The authors gave no licence with these weights."
# Of the release: dropout before the last layer of the head.
_HEAD_DROPOUT = 0.3


@dataclass(frozen=True)
class _Architecture:
    """One of the two kinds of expert.

    Attributes:
        base: the backbone at full size.
        full_size: arguments of timm's `create_model` that the full size has.
        prefix_tokens: position embeddings before those of the patches.
    """

    base: BackboneSpec
    full_size: dict[str, Any]
    prefix_tokens: int


# Sizes: transformers' ViT-L/14 and So400M/14 towers, and timm's models of those names.
_CLIP = _Architecture(
    BACKBONES["clip_l14"],
    {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0, "num_classes": 768},
    1,
)
_SIGLIP = _Architecture(
    BACKBONES["siglip_so400m"],
    {"patch_size": 14, "embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
    0,
)
# Keys, or beginnings of keys, that only one of the two has.
_CLIP_KEYS = ("embeddings.class_embedding", "pre_layrnorm.", "visual_projection.")
_SIGLIP_KEYS = ("head.",)


def read_released(folder: str | Path) -> dict[str, Expert]:
    """Read the authors' experts; they are in evaluation mode, on the CPU, in float32.

    Args:
        folder: holds `manifest.json` and the files it names.

    Returns:
        Experts by the names of their files without `.pth`, in the manifest's order.

    Raises:
        UserError: a file is missing, is not what the manifest says, or does not hold exactly the weights of
            an expert.
    """
    files = read_manifest(folder)
    verify(files.values())
    return {name: read_file(file) for name, file in files.items()}


def released_hashes(folder: str | Path) -> dict[str, str]:
    """Return the SHA-256 of each file by the expert's name, as the manifest states it.

    `read_released` holds the files against these.
    """
    return {name: file.sha256 for name, file in read_manifest(folder).items()}


def read_file(file: ReleasedFile) -> Expert:
    """Turn one released file into an expert of ours; see `read_released`."""
    source = ReleasedTensors(file.path)
    spec = read_spec(source, file.num_heads)
    # Without memory of its own: the weights that are read take the place of the new ones.
    with torch.device("meta"):
        backbone = build(spec)
    hidden = source.shape("classifier.0.bias", 1)[0]
    expert = Expert(backbone, spec, hidden, _HEAD_DROPOUT)
    state = _head(source, backbone.feature_dim, hidden)
    for key, value in _tower(source, spec).items():
        state[f"backbone.model.{key}"] = value
    source.finish()
    expert.load_state_dict(state, strict=True, assign=True)
    return expert.to(memory_format=torch.channels_last).eval()


def read_spec(source: ReleasedTensors, num_heads: int | None = None) -> BackboneSpec:
    """Tell CLIP from SigLIP by the keys and read the sizes from the shapes.

    Args:
        num_heads: attention heads, where they are known.

    Returns:
        The specification, whose options are what differs from the full size.

    Raises:
        UserError: a tensor that shows a size is missing, or the sizes are those of no image tower.
    """
    if not source.has(_CLIP_KEYS + _SIGLIP_KEYS):
        raise UserError(f"{source.path} is no released expert: it has the keys of neither CLIP nor SigLIP")
    architecture = _CLIP if source.has(_CLIP_KEYS) else _SIGLIP
    full = architecture.full_size
    width, hidden = source.length("layer_norm1.bias"), source.length("mlp.fc1.bias")
    patch_px = source.shape("embeddings.patch_embedding.weight", 4)[-1]
    grid = _grid(source, architecture.prefix_tokens)
    # A width that 64 does not divide gives a number that is not whole.
    heads = num_heads or (width / 64 if architecture is _CLIP else full["num_heads"])
    if heads != int(heads) or width % heads:
        raise UserError(
            f"{source.path}: {width} channels do not make {heads:g} heads; state num_heads in {MANIFEST_FILE}"
        )
    # timm rounds width x ratio down.
    ratio = hidden / width if hidden % width == 0 else (hidden + 0.5) / width
    found = {
        "patch_size": patch_px,
        "embed_dim": width,
        "depth": source.count_layers(),
        "num_heads": int(heads),
        "mlp_ratio": full["mlp_ratio"] if int(width * full["mlp_ratio"]) == hidden else ratio,
    }
    size_px = grid * patch_px
    if architecture is _CLIP:
        found["num_classes"] = source.shape("visual_projection.weight", 2)[0]
    else:
        # SigLIP's patches leave a margin (27 x 14 = 378 of 384 px); its input sizes are multiples of 32.
        multiple_px = -(-size_px // 32) * 32
        size_px = multiple_px if multiple_px < size_px + patch_px else size_px
    options = {key: value for key, value in found.items() if value != full[key]}
    base = architecture.base
    return dataclasses.replace(base, input_size=size_px, options=base.options | options)


def _grid(source: ReleasedTensors, prefix_tokens: int) -> int:
    """Return the patches along a side."""
    name = "embeddings.position_embedding.weight"
    shape = source.shape(name, 2)
    grid = math.isqrt(max(shape[0] - prefix_tokens, 0))
    if grid == 0 or grid**2 != shape[0] - prefix_tokens:
        raise UserError(f"{source.path}: {source.key(name)} is {shape}, no square of patches")
    return grid


def _tower(source: ReleasedTensors, spec: BackboneSpec) -> dict[str, Tensor]:
    """Take the image tower out of a file, under timm's names."""
    architecture = _CLIP if spec.feature == "projection" else _SIGLIP
    sizes = architecture.full_size | spec.options
    width, patch_px, heads_out = sizes["embed_dim"], sizes["patch_size"], sizes.get("num_classes")
    hidden = int(width * sizes["mlp_ratio"])
    positions = (spec.input_size // patch_px) ** 2 + architecture.prefix_tokens
    state: dict[str, Tensor] = {}

    def pair(target: str, name: str, *shape: int) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = source.take_pair(name, *shape)

    state["pos_embed"] = source.take("embeddings.position_embedding.weight", positions, width)[None]
    patches = (width, 3, patch_px, patch_px)
    if architecture is _CLIP:
        state["cls_token"] = source.take("embeddings.class_embedding", width)[None, None]
        state["patch_embed.proj.weight"] = source.take("embeddings.patch_embedding.weight", *patches)
        pair("norm_pre", "pre_layrnorm", width)
        state["head.weight"] = source.take("visual_projection.weight", heads_out, width)
        # timm's layer has a bias, the release's projection has none.
        state["head.bias"] = torch.zeros(heads_out)
    else:
        pair("patch_embed.proj", "embeddings.patch_embedding", *patches)
        state |= _attention_pool(source, width, hidden)
    for layer in range(sizes["depth"]):
        ours, theirs = f"blocks.{layer}", f"encoder.layers.{layer}"
        pair(f"{ours}.norm1", f"{theirs}.layer_norm1", width)
        parts = [source.take_pair(f"{theirs}.self_attn.{part}_proj", width, width) for part in "qkv"]
        state[f"{ours}.attn.qkv.weight"] = torch.cat([weight for weight, _ in parts])
        state[f"{ours}.attn.qkv.bias"] = torch.cat([bias for _, bias in parts])
        pair(f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj", width, width)
        pair(f"{ours}.norm2", f"{theirs}.layer_norm2", width)
        pair(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", hidden, width)
        pair(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", width, hidden)
    pair("norm", "post_layernorm", width)
    return state


def _attention_pool(source: ReleasedTensors, width: int, hidden: int) -> dict[str, Tensor]:
    """Take SigLIP's attention pooling: a learnt query, and an MLP of its own."""
    state = {"latent": source.take("head.probe", 1, 1, width)}
    for kind, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
        whole = source.take(f"head.attention.in_proj_{kind}", *shape)
        state[f"q.{kind}"], state[f"kv.{kind}"] = (part.clone() for part in whole.split([width, 2 * width]))
    for ours, theirs, shape in (
        ("proj", "head.attention.out_proj", (width, width)),
        ("norm", "head.layernorm", (width,)),
        ("mlp.fc1", "head.mlp.fc1", (hidden, width)),
        ("mlp.fc2", "head.mlp.fc2", (width, hidden)),
    ):
        state[f"{ours}.weight"], state[f"{ours}.bias"] = source.take_pair(theirs, *shape)
    return {f"attn_pool.{key}": value for key, value in state.items()}


def _head(source: ReleasedTensors, feature_dim: int, hidden: int) -> dict[str, Tensor]:
    """Take the head; softmax over two classes equals the sigmoid of their difference."""
    state = {}
    state["head.0.weight"], state["head.0.bias"] = source.take_pair("classifier.0", hidden, feature_dim)
    weight, bias = source.take_pair("classifier.3", 2, hidden)
    state["head.3.weight"], state["head.3.bias"] = weight[1:] - weight[:1], bias[1:] - bias[:1]
    return state


def convert(folder: str | Path, out: str | Path) -> list[Path]:
    """Write an expert's folder of each released file; one made of the same file before is left alone.

    Raises:
        UserError: as `read_released`; or a folder of the same name holds something else.
    """
    files = read_manifest(folder)
    targets = {name: Path(out) / name for name in files}
    missing = {name: file for name, file in files.items() if not _is_made_of(targets[name], file)}
    verify(missing.values())
    for name, file in files.items():
        if name in missing:
            released = {"file": file.path.name, "sha256": file.sha256, "licence": _LICENCE}
            save_expert(read_file(file), targets[name], {"released": released})
        print(f"{targets[name]}: {'made of' if name in missing else 'was there already, of'} {file.path}")
    return list(targets.values())


def _is_made_of(target: Path, file: ReleasedFile) -> bool:
    if not target.exists():
        return False
    released = read_card(target).get("released") if (target / CARD_FILE).is_file() else None
    if not isinstance(released, dict):
        raise UserError(f"{target} exists and is no converted expert; give another --out, or remove it")
    return released.get("sha256") == file.sha256 and (target / WEIGHTS_FILE).is_file()


def build_parser() -> Parser:
    parser = Parser(description="Convert the authors' released experts, once, to experts of ours.")
    parser.add_argument("folder", help=f"holds {MANIFEST_FILE} and the files it names")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets a folder an expert")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    convert(arguments.folder, arguments.out)
    print(_LICENCE)
    return 0
