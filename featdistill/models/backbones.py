"""The zoo: image encoders by name, each giving a pooled feature and its token map.

    python -m featdistill backbones --list
    python -m featdistill backbones --show timm:vit_small_patch14_reg4_dinov2.lvd142m

Names: a short name of `BACKBONES`, `timm:NAME`, or `open_clip:NAME` (with `/TAG` where hub weights are
wanted). Weights: `hub` (downloaded by the library), `random`, or the path of a local file (safetensors, or a
PyTorch state dict, which is only ever read with `weights_only=True`).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch

from featdistill.command_line import Parser, UserError, nearest
from featdistill.models.encoders import CLIP_MEAN, CLIP_STD, Backbone, TimmBackbone, check_multiple, patch_px
from featdistill.models.tiny import tiny_transformer
from featdistill.models.weights import FILE_WEIGHTS, first_line, from_hub, load_timm_file

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class BackboneSpec:
    """How a backbone is built; plain data, stored with every expert.

    Attributes:
        library: who builds it: timm, open_clip, or this project (`tiny`).
        name: the library's own name of the architecture.
        tag: the library's name of the pretrained weights, or a key of `FILE_WEIGHTS`.
        feature: `pool` for the pooled embedding, `projection` for the one projected to the joint space
            (CLIP).
        input_size: side of the input in px; None for the architecture's own.
        options: further arguments of timm's `create_model` that make the architecture another one, such as
            its width or depth.
    """

    library: Literal["timm", "open_clip", "tiny"]
    name: str
    tag: str = ""
    feature: Literal["pool", "projection"] = "pool"
    input_size: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """The name by which timm knows architecture and weights together."""
        return f"{self.name}.{self.tag}" if self.tag and self.tag not in FILE_WEIGHTS else self.name


# Paper, Table 2 and section 4.5 (which adds DINO and CoCa); DINOv3 and SigLIP 2 go beyond it. The feature
# that CLIP's and SigLIP's experts take is that of the authors' inference release.
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
    "dinov3_l": BackboneSpec("timm", "vit_large_patch16_dinov3", "lvd1689m"),
    "siglip2_giant": BackboneSpec("timm", "vit_giantopt_patch16_siglip_384", "v2_webli"),
    "tiny_clip": BackboneSpec("tiny", "clip", feature="projection"),
    "tiny_siglip": BackboneSpec("tiny", "siglip"),
}
# Where timm names no licence, or its default instead of the authors': by the tag of the weights.
_LICENCES = {"openai": "MIT", "laion2b_s13b_b90k": "MIT"}
_LICENCE_NAMES = {"mit": "MIT", "apache-2.0": "Apache-2.0", "dinov3-license": "DINOv3 licence"}


def resolve_spec(name: str, input_size: int | None = None) -> BackboneSpec:
    """Return the specification of a backbone by name.

    Raises:
        UserError: neither the zoo nor the library knows the name; the nearest one is named.
    """
    library, separator, rest = name.partition(":")
    if not separator:
        if name not in BACKBONES:
            known = f"{', '.join(BACKBONES)}, timm:NAME, open_clip:NAME"
            raise UserError(f"unknown backbone '{name}'{nearest(name, BACKBONES)}; known: {known}")
        spec = BACKBONES[name]
    elif library == "timm":
        architecture, _, tag = rest.partition(".")
        if not timm.is_model(architecture):
            raise UserError(f"timm has no model '{architecture}'{nearest(architecture, timm.list_models())}")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        _check_tag(f"timm:{architecture}", tag, [*tags, *FILE_WEIGHTS])
        spec = BackboneSpec("timm", architecture, tag)
    elif library == "open_clip":
        import open_clip  # takes seconds, and few experts are built on it

        architecture, _, tag = rest.partition("/")
        if architecture not in open_clip.list_models():
            suggestion = nearest(architecture, open_clip.list_models())
            raise UserError(f"open_clip has no model '{architecture}'{suggestion}")
        _check_tag(f"open_clip:{architecture}", tag, open_clip.list_pretrained_tags_by_model(architecture))
        spec = BackboneSpec("open_clip", architecture, tag, "projection")
    else:
        raise UserError(f"unknown library '{library}' in backbone '{name}'; known: timm, open_clip")
    return dataclasses.replace(spec, input_size=input_size or spec.input_size)


def _check_tag(model: str, tag: str, tags: list[str]) -> None:
    if tag and tag not in tags:
        raise UserError(f"{model} has no weights '{tag}'{nearest(tag, tags)}; it has: {', '.join(tags)}")


def build(spec: BackboneSpec, weights: str = "random") -> Backbone:
    """Build a backbone and fill in its weights.

    Args:
        weights: `hub`, `random`, or the path of a local weights file.

    Raises:
        UserError: the weights are not to be had, or do not fit the architecture; or the input size does not.
    """
    if weights not in ("hub", "random") and not Path(weights).is_file():
        raise UserError(f"weights file {weights} does not exist (give hub, random, or a file)")
    if spec.input_size is not None and spec.input_size < 1:
        raise UserError(f"input size {spec.input_size} px of {spec.name} must be at least 1")
    if spec.library == "open_clip":
        from featdistill.models.open_clip_encoders import build_open_clip

        return build_open_clip(spec.name, spec.tag, spec.input_size, weights)
    return (_build_timm if spec.library == "timm" else _build_tiny)(spec, weights)


def _build_timm(spec: BackboneSpec, weights: str) -> Backbone:
    config = timm.get_pretrained_cfg(spec.full_name)
    kwargs: dict[str, Any] = {} if spec.feature == "projection" else {"num_classes": 0}
    kwargs |= spec.options
    own_size = config.input_size[-1]
    size = spec.input_size or own_size
    if size != own_size:
        kwargs |= {"img_size": size} if config.fixed_input_size else {}
        _check_timm_size(spec, size, kwargs)
    given = FILE_WEIGHTS.get(spec.tag)
    if weights == "hub":
        if given:
            raise UserError(
                f"the weights '{spec.tag}' cannot be downloaded by name: get {given.source} "
                f"(licence {given.licence}) and give the file with --weights FILE"
            )
        model = from_hub(spec.full_name, lambda: timm.create_model(spec.full_name, pretrained=True, **kwargs))
    else:
        model = timm.create_model(spec.full_name, pretrained=False, **kwargs)
    if weights not in ("hub", "random"):
        load_timm_file(model, weights, spec.tag)
    mean, std = (given.mean, given.std) if given else (config.mean, config.std)
    return TimmBackbone(model, spec.feature, size, mean, std, config.interpolation)


def _check_timm_size(spec: BackboneSpec, size: int, kwargs: dict[str, Any]) -> None:
    """Raise a `UserError` where a model of timm cannot take images of another size than its own."""
    what = f"input size {size} px does not fit timm:{spec.name}"
    try:
        with torch.device("meta"):
            model = timm.create_model(spec.full_name, **kwargs).eval()
            # An architecture whose sizes are changed by options has none of its own to be held against.
            if spec.options.keys() <= {"act_layer"}:
                check_multiple(what, size, patch_px(model))
            model.forward_features(torch.empty(1, 3, size, size))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{what}: {first_line(error)}") from error


def _build_tiny(spec: BackboneSpec, weights: str) -> Backbone:
    if weights == "hub":
        raise UserError(f"tiny_{spec.name} has no published weights; use weights: random or a local file")
    size = spec.input_size or 96
    model = tiny_transformer(spec.name, size)
    if weights != "random":
        load_timm_file(model, weights)
    mean, std = (CLIP_MEAN, CLIP_STD) if spec.name == "clip" else (HALF, HALF)
    return TimmBackbone(model, spec.feature, size, mean, std)


class Facts(NamedTuple):
    """What a backbone is, without its weights.

    Attributes:
        parameters: how many, in millions.
        input_px: side of its input.
        feature: width of the pooled feature.
        tokens, width: how many tokens of the last layer, and how wide they are.
        stride_px: side of the square of pixels that is one token.
        licence: of the weights.
    """

    parameters: float
    input_px: int
    feature: int
    tokens: int
    width: int
    stride_px: int
    licence: str


def facts(spec: BackboneSpec) -> Facts:
    """Measure a backbone on the meta device: nothing is downloaded or computed."""
    with torch.device("meta"):
        backbone = build(spec).eval()
        size = backbone.input_size
        tokens = backbone(torch.empty(1, 3, size, size))[1]
    parameters = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    count, width = tokens.shape[1:]
    stride = size // round(count**0.5)
    return Facts(parameters, size, backbone.feature_dim, count, width, stride, _licence(spec))


def _licence(spec: BackboneSpec) -> str:
    if spec.library == "tiny":
        return "no published weights"
    if spec.tag in FILE_WEIGHTS:
        return FILE_WEIGHTS[spec.tag].licence
    stated = timm.get_pretrained_cfg(spec.full_name).license if spec.library == "timm" else None
    return _LICENCES.get(spec.tag) or _LICENCE_NAMES.get(stated, stated) or f"not said by {spec.library}"


def build_parser() -> Parser:
    parser = Parser(description="The backbones that an expert can be built on; nothing is downloaded.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="list the backbones that have short names")
    action.add_argument("--show", metavar="NAME", help="describe one, timm:NAME and open_clip:NAME too")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    names = list(BACKBONES) if arguments.list else [arguments.show]
    specs = {name: resolve_spec(name) for name in names}
    width = max(len(name) for name in ["name", *names])
    print(
        f"{'name':{width}} {'params (M)':>10} {'input px':>8} {'feature':>7} {'tokens':>11} {'px/token':>8}  "
        "licence of the weights"
    )
    for name, spec in specs.items():
        one = facts(spec)
        print(
            f"{name:{width}} {one.parameters:10.1f} {one.input_px:8} {one.feature:7} "
            f"{f'{one.tokens} x {one.width}':>11} {one.stride_px:8}  {one.licence}"
        )
    return 0
