"""What an expert sees in an image: its input, the texture of its patches, what masking hides, where it looks.

    python -m featdistill explain photo.jpg --expert runs/stage2/clip_l14_a/expert --out photo.png
    python -m featdistill explain photo.jpg --expert ... --out photo.png --mask random --mask-ratio 0.3

Which map of the expert is shown depends on its backbone, see `token_maps`; its title says which one it is.
It shows where the expert looks, not why the image is one or the other.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featdistill import atomic
from featdistill.command_line import Parser, UserError
from featdistill.data.preprocessing import prepare
from featdistill.images.reading import BrokenImage, read_image
from featdistill.models.expert import Expert, load_expert, read_card
from featdistill.models.masking import KINDS, SCORES, SELECTIONS, PatchMasking, fill_patches, texture_scores
from featdistill.models.token_maps import LOGIT, token_map
from featdistill.report.gallery import ExpertMap, Explainer

_PANEL_IN, _TOP_IN, _BOTTOM_IN, _DPI = 3.1, 0.75, 0.45, 120
# How much of a map covers the grey image below it.
_ALPHA = 0.7


def explain(
    expert: Expert,
    image: np.ndarray,
    *,
    mask: str = "texture",
    ratio: float = 0.5,
    select: str = "top",
    score: str = "differences",
    seed: int = 0,
) -> dict[str, Any]:
    """Return what there is to be shown of an image.

    Args:
        expert: in evaluation mode.
        image: (H, W, 3) uint8 RGB.
        mask, ratio, select, score, seed: see `masking.PatchMasking`.

    Returns:
        `image` (S, S, 3) uint8, the expert's input; `texture` (rows, columns) int64, the score of each patch;
        `mask` (rows, columns) bool, the patches that are hidden; `masked` (S, S, 3) uint8, the input without
        them; `map` (rows, columns) float32 and `map_kind`, see `token_maps`; `logit` and `probability`.
    """
    masking = PatchMasking(expert, mask, ratio=ratio, select=select, score=score, seed=seed)
    pixels = prepare(image, *expert.preprocessing.key)
    one, place = pixels[None], torch.zeros(1, dtype=torch.int64)
    texture = texture_scores(one, masking.patch_px, score)
    hidden = masking.mask(one, place, place)
    masked = fill_patches(one, hidden, masking.patch_px, masking.colour.cpu())
    found = token_map(expert, pixels)
    grid = math.isqrt(texture.shape[1])
    return {
        "image": pixels.permute(1, 2, 0).numpy(),
        "texture": texture.view(grid, grid).numpy(),
        "mask": hidden.view(grid, grid).numpy(),
        "masked": masked[0].permute(1, 2, 0).numpy(),
        "map": found.values.numpy(),
        "map_kind": found.kind,
        "logit": found.logit,
        "probability": 1 / (1 + math.exp(-found.logit)),
    }


def explainer(folder: str | Path) -> Explainer:
    """Return what lays an expert's map over images, for the report's surest mistakes.

    Raises:
        UserError: the folder holds no expert.
    """
    expert = load_expert(folder)
    name = _name(expert, folder)

    def explained(image: np.ndarray) -> ExpertMap:
        found = explain(expert, image)
        return ExpertMap(overlay(found), name, _colouring(found)[0], found["probability"])

    return explained


def overlay(found: dict[str, Any]) -> np.ndarray:
    """Return the map over the grey input as (S, S, 3) uint8, in the colours of `draw`.

    Args:
        found: what `explain` returned.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    _, colours = _colouring(found)
    scaled = Normalize(colours.get("vmin"), colours.get("vmax"))(found["map"])
    painted = colormaps[colours["cmap"]](scaled)[..., :3]
    side = found["image"].shape[0]
    down, across = (np.arange(side) * tokens // side for tokens in found["map"].shape)
    grey = found["image"].mean(axis=2)[..., None]
    mixed = _ALPHA * 255 * painted[np.ix_(down, across)] + (1 - _ALPHA) * grey
    return mixed.round().astype(np.uint8)


def draw(found: dict[str, Any], title: str, mask_title: str, out: str | Path) -> None:
    """Write a PNG of four panels; the same content gives the same bytes.

    Args:
        found: what `explain` returned.
        title: stands above all panels, before P(AI).
        mask_title: how the mask was made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure((4 * _PANEL_IN, _PANEL_IN + _TOP_IN + _BOTTOM_IN), dpi=_DPI)
    FigureCanvasAgg(figure)
    height = _PANEL_IN + _TOP_IN + _BOTTOM_IN
    image, side = found["image"], found["image"].shape[0]
    grey = image.mean(axis=2)
    panels = []
    for number in range(4):
        box = (number / 4 + 0.006, _BOTTOM_IN / height, 0.25 - 0.012, _PANEL_IN / height - 0.01)
        panels.append(figure.add_axes(box))
        panels[-1].set_axis_off()
    panels[0].imshow(image)
    panels[0].set_title(f"input, {side} x {side} px", fontsize=10, loc="left")
    texture = ("texture of each patch (square root)", {"cmap": "viridis"})
    for panel, values, (name, colours) in (
        (panels[1], np.sqrt(found["texture"]), texture),
        (panels[3], found["map"], _colouring(found)),
    ):
        panel.imshow(grey, cmap="gray", vmin=0, vmax=255)
        shown = panel.imshow(values, alpha=_ALPHA, extent=(-0.5, side - 0.5, side - 0.5, -0.5), **colours)
        panel.set_title(name, fontsize=10, loc="left")
        left, _, width, _ = panel.get_position().bounds
        # A little narrower than the panel, so that its last number has room.
        box = (left + 0.05 * width, 0.62 * _BOTTOM_IN / height, 0.9 * width, 0.2 * _BOTTOM_IN / height)
        bar = figure.add_axes(box)
        scale = figure.colorbar(shown, cax=bar, orientation="horizontal", ticks=MaxNLocator(5))
        scale.ax.tick_params(labelsize=7)
    panels[2].imshow(found["masked"])
    panels[2].set_title(mask_title, fontsize=10, loc="left")
    figure.text(0.006, 1 - 0.25 / height, title, fontsize=12, va="center")
    text = f"P(AI) = {found['probability']:.3f}"
    figure.text(0.994, 1 - 0.25 / height, text, fontsize=12, va="center", ha="right", weight="bold")
    with atomic.replace_file(out) as beside:
        # Without matplotlib's version in the file, the bytes depend on the content alone.
        figure.savefig(beside, format="png", metadata={"Software": None})


def _colouring(found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what an expert's map is called, and the colours that it is shown in."""
    kind = found["map_kind"]
    if kind != LOGIT:
        return kind, {"cmap": "viridis"}
    # Real and AI-generated have colours of their own, and 0 has none.
    most = float(np.abs(found["map"]).max())
    return f"{kind} (red: AI)", {"cmap": "coolwarm", "vmin": -most, "vmax": most}


def _name(expert: Expert, folder: str | Path) -> str:
    return read_card(folder).get("recipe", {}).get("name", expert.spec.name)


def build_parser() -> Parser:
    parser = Parser(description="Draw what an expert sees in an image, and where it looks.")
    parser.add_argument("image", metavar="IMAGE", help="an image file, or archive.zip::member")
    parser.add_argument("--expert", required=True, metavar="EXPERT", help="the expert's folder")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where the picture goes")
    parser.add_argument("--mask", choices=KINDS[1:], default="texture", help="which patches are hidden")
    parser.add_argument("--mask-ratio", type=float, default=0.5, help="share of the patches that is hidden")
    parser.add_argument(
        "--mask-select", choices=SELECTIONS, default="top", help="the first by texture, or drawn by it"
    )
    parser.add_argument(
        "--mask-score", choices=SCORES, default="differences", help="how the texture of a patch is measured"
    )
    parser.add_argument("--seed", type=int, default=0, help="of masks that are drawn")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if not 0 <= arguments.mask_ratio <= 1:
        raise UserError(f"--mask-ratio must lie between 0 and 1, not {arguments.mask_ratio}")
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, not {arguments.seed}")
    expert = load_expert(arguments.expert)
    try:
        image = read_image(arguments.image)
    except BrokenImage as error:
        raise UserError(f"cannot read {arguments.image}: {error}") from error
    found = explain(
        expert,
        image,
        mask=arguments.mask,
        ratio=arguments.mask_ratio,
        select=arguments.mask_select,
        score=arguments.mask_score,
        seed=arguments.seed,
    )
    hidden = found["mask"]
    mask_title = f"{arguments.mask} masked, {hidden.sum()} of {hidden.size} patches"
    name = _name(expert, arguments.expert)
    draw(found, f"{Path(arguments.image).name}, seen by {name}", mask_title, arguments.out)
    print(f"P(AI) {found['probability']:.4f}; {found['map_kind']} -> {arguments.out}")
    return 0
