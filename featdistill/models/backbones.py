"""The zoo: image encoders by name.

    python -m featdistill backbones --list
    python -m featdistill backbones --show timm:vit_small_patch14_reg4_dinov2.lvd142m

Names: a short name of `BACKBONES`, `timm:NAME`, or `open_clip:NAME` (`open_clip:NAME/TAG` for downloaded
weights). Weights: `hub` (downloaded by the library), `random`, or the path of a local file (safetensors, or a
PyTorch state dict, which is only read with `weights_only=True`).

The libraries are imported when a backbone of theirs is built or looked up: each takes seconds.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from featdistill.command_line import UserError, nearest
from featdistill.models.encoders import Backbone, BackboneSpec
from featdistill.models.weights import FILE_WEIGHTS, first_line
from featdistill.recipe_groups import check_weights
from featdistill.text_tables import table

# Paper, Table 2 and section 4.5 (which adds DINO and CoCa), then those of the challenge's other teams, and
# smaller ones of their kind. CLIP's and SigLIP's experts use the feature of the authors' inference release.
BACKBONES: dict[str, BackboneSpec] = {
    "swin_t": BackboneSpec("timm", "swin_tiny_patch4_window7_224", "ms_in1k"),
    "clip_rn50x64": BackboneSpec("open_clip", "RN50x64", "openai", "projection"),
    "mocov3_b": BackboneSpec("timm", "vit_base_patch16_224", "mocov3"),
    "convnext_b": BackboneSpec("timm", "convnext_base", "fb_in22k_ft_in1k"),
    "beit_b": BackboneSpec("timm", "beit_base_patch16_224", "in22k_ft_in22k_in1k"),
    "dinov2_b": BackboneSpec("timm", "vit_base_patch14_dinov2", "lvd142m", input_size=224),
    "dino_b": BackboneSpec("timm", "vit_base_patch16_224", "dino"),
    "coca_l14": BackboneSpec("open_clip", "coca_ViT-L-14", "laion2b_s13b_b90k", "projection"),
    "clip_l14": BackboneSpec("timm", "vit_large_patch14_clip_quickgelu_224", "openai", "projection"),
    # Trained with the tanh form of GELU; timm's model of this name has the exact one.
    "siglip_so400m": BackboneSpec(
        "timm", "vit_so400m_patch14_siglip_384", "webli", options={"act_layer": "gelu_tanh"}
    ),
    "dinov3_s": BackboneSpec("timm", "vit_small_patch16_dinov3", "lvd1689m"),
    "dinov3_b": BackboneSpec("timm", "vit_base_patch16_dinov3", "lvd1689m"),
    "dinov3_l": BackboneSpec("timm", "vit_large_patch16_dinov3", "lvd1689m"),
    "dinov3_h_plus": BackboneSpec("timm", "vit_huge_plus_patch16_dinov3", "lvd1689m"),
    "dinov3_7b": BackboneSpec("timm", "vit_7b_patch16_dinov3", "lvd1689m"),
    "dinov2_reg_l": BackboneSpec("timm", "vit_large_patch14_reg4_dinov2", "lvd142m", input_size=224),
    "siglip2_giant": BackboneSpec("timm", "vit_giantopt_patch16_siglip_384", "v2_webli"),
    "metaclip2_giant": BackboneSpec(
        "timm", "vit_gigantic_patch14_clip_378", "metaclip2_worldwide", "projection"
    ),
    "eva02_l": BackboneSpec("timm", "eva02_large_patch14_448", "mim_m38m_ft_in22k_in1k"),
    "eva02_clip_l": BackboneSpec("timm", "eva02_large_patch14_clip_336", "merged2b", "projection"),
    "pe_core_l": BackboneSpec("timm", "vit_pe_core_large_patch14_336", "fb", "projection"),
    "clip_b16": BackboneSpec("timm", "vit_base_patch16_clip_quickgelu_224", "openai", "projection"),
    "tiny_clip": BackboneSpec("tiny", "clip", feature="projection"),
    "tiny_siglip": BackboneSpec("tiny", "siglip"),
    "tiny_student": BackboneSpec("tiny", "student"),
}
# By the tag of weights for which timm states no license, or its default instead of the authors'.
_LICENSES = {"openai": "MIT", "laion2b_s13b_b90k": "MIT"}
_LICENSE_NAMES = {"mit": "MIT", "apache-2.0": "Apache-2.0", "dinov3-license": "DINOv3 license"}
_LICENSE_NAMES |= {"cc-by-nc-4.0": "CC BY-NC 4.0"}


def resolve_spec(name: str, input_size: int | None = None, feature: str | None = None) -> BackboneSpec:
    """Return the specification of a backbone by name.

    Args:
        input_size: side of the input in px; None for the backbone's default.
        feature: what the head gets, see `features`; None for the backbone's default.

    Raises:
        UserError: neither the zoo nor the library knows the name; the message suggests the nearest one.
    """
    library, separator, rest = name.partition(":")
    if not separator:
        if name not in BACKBONES:
            known = f"{', '.join(BACKBONES)}, timm:NAME, open_clip:NAME"
            raise UserError(f"unknown backbone '{name}'{nearest(name, BACKBONES)}; known: {known}")
        spec = BACKBONES[name]
    elif library == "timm":
        import timm

        architecture, _, tag = rest.partition(".")
        if not timm.is_model(architecture):
            raise UserError(f"timm has no model '{architecture}'{nearest(architecture, timm.list_models())}")
        tags = [full_name.partition(".")[2] for full_name in timm.list_pretrained(f"{architecture}.*")]
        spec = BackboneSpec("timm", architecture, _check_tag(name, tag, [*tags, *FILE_WEIGHTS]))
    elif library == "open_clip":
        import open_clip

        architecture, _, tag = rest.partition("/")
        models = open_clip.list_models()
        if architecture not in models:
            raise UserError(f"open_clip has no model '{architecture}'{nearest(architecture, models)}")
        _check_tag(name, tag, open_clip.list_pretrained_tags_by_model(architecture))
        spec = BackboneSpec("open_clip", architecture, tag, "projection")
    else:
        raise UserError(f"unknown library '{library}' in backbone '{name}'; known: timm, open_clip")
    return dataclasses.replace(
        spec, input_size=input_size or spec.input_size, feature=feature or spec.feature
    )


def _check_tag(name: str, tag: str, tags: list[str]) -> str:
    if tag and tag not in tags:
        model = name[: -len(tag) - 1]
        raise UserError(f"{model} has no weights '{tag}'{nearest(tag, tags)}; it has: {', '.join(tags)}")
    return tag


def build(spec: BackboneSpec, weights: str = "random") -> Backbone:
    """Build a backbone and fill in its weights.

    Args:
        weights: `hub`, `random`, or the path of a local weights file.

    Raises:
        UserError: the weights are not available or do not fit the architecture, or the input size does not.
    """
    check_weights(weights)
    if spec.input_size is not None and spec.input_size < 1:
        raise UserError(f"input_size must be at least 1, not {spec.input_size}")
    if spec.library == "open_clip":
        from featdistill.models.open_clip_encoders import build_open_clip

        return build_open_clip(spec, weights)
    from featdistill.models.timm_encoders import build_timm, build_tiny

    return build_timm(spec, weights) if spec.library == "timm" else build_tiny(spec, weights)


def with_any_size(spec: BackboneSpec, sizes: Sequence[int]) -> BackboneSpec:
    """Return the specification of a backbone that accepts inputs of several sides, in px.

    Transformers of timm are built so that their position embeddings are interpolated for every input;
    convolutional networks need nothing.

    Raises:
        UserError: the backbone does not accept one of the sides, or its feature depends on the grid.
    """
    name = f"{spec.library}:{spec.name}"
    if spec.library == "open_clip":
        raise UserError(f"{name} has inputs of one size; for input_sizes, use a backbone of timm")
    if spec.positions or "top_tokens" in spec.feature:
        raise UserError(f"the feature {spec.feature} names tokens of one grid; it does not fit input_sizes")
    reasons = []
    for options in ({"dynamic_img_size": True}, {}):
        flexible = dataclasses.replace(spec, options=spec.options | options)
        try:
            with torch.device("meta"):
                backbone = build(flexible).eval()
                for size in sizes:
                    if spec.library == "tiny":  # its stem would round the grid down without a word
                        build(dataclasses.replace(flexible, input_size=size))
                    backbone(torch.empty(1, 3, size, size))
            return flexible
        except (UserError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            reasons.append(first_line(error))
    # A network that does not know the option says so first.
    reason = next(reason for reason in reasons if "dynamic_img_size" not in reason)
    raise UserError(f"{name} does not accept inputs of {', '.join(map(str, sizes))} px: {reason}")


class Facts(NamedTuple):
    """Properties of a backbone: millions of parameters, widths and numbers, sides in px."""

    parameters: float
    input_px: int
    feature: int
    tokens: int
    width: int
    stride_px: int
    license: str


def facts(spec: BackboneSpec) -> Facts:
    """Measure a backbone on the meta device: nothing is downloaded or computed."""
    with torch.device("meta"):
        backbone = build(spec).eval()
        size = backbone.input_size
        tokens = backbone(torch.empty(1, 3, size, size))[1]
    parameters = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    count, width = tokens.shape[1:]
    stride = size // round(count**0.5)
    return Facts(parameters, size, backbone.feature_dim, count, width, stride, license_of(spec))


def license_of(spec: BackboneSpec) -> str:
    """Return the license of a backbone's published weights, or that none is stated."""
    if spec.library == "tiny":
        return "no published weights"
    if spec.tag in FILE_WEIGHTS:
        return FILE_WEIGHTS[spec.tag].license
    stated = None
    if spec.library == "timm":
        import timm

        stated = timm.get_pretrained_cfg(spec.full_name).license
    return _LICENSES.get(spec.tag) or _LICENSE_NAMES.get(stated, stated) or f"not stated by {spec.library}"


def facts_table(names: list[str]) -> str:
    """Return the facts of backbones by name as a table."""
    header = ("name", "params (M)", "input px", "feature", "tokens", "px/token", "license of the weights")
    rows = []
    for name in names:
        row = facts(resolve_spec(name))
        sizes = (f"{row.parameters:.1f}", str(row.input_px), str(row.feature))
        rows.append((name, *sizes, f"{row.tokens} x {row.width}", str(row.stride_px), row.license))
    return table(header, rows)
