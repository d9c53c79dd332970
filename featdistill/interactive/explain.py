"""What an expert sees in an image: its input, the texture of the patches, a mask, and where it looks.

    python -m featdistill explain photo.jpg --expert runs/stage2/clip_l14_a/expert --out photo.png
    python -m featdistill explain photo.jpg --expert ... --out photo.png --mask random --mask-ratio 0.3

What the map of the expert shows depends on its backbone (see `token_maps`); its title says it. It shows where
the expert looks, not why it calls the image real or AI-generated.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.images.listing import printable
from featdistill.images.reading import BrokenImage, read_image
from featdistill.inference.references import Opened, is_folder, name_of, open_expert
from featdistill.models.expert import Expert
from featdistill.models.masking import PatchMasking, fill_patches, texture_scores
from featdistill.models.token_maps import LOGIT, token_map
from featdistill.recipe_groups import Masking
from featdistill.report.gallery import ExpertMap, Explainer
from featdistill.runtimes.graph_expert import require_trained

_SIZE_IN, _DPI = (12.4, 4.0), 120
TEXTURE = Masking(mask="texture")
# Opacity of a map over the gray image.
_ALPHA = 0.7


def explain(expert: Expert, image: np.ndarray, options: Masking = TEXTURE, seed: int = 0) -> dict[str, Any]:
    """Return the maps of an image.

    Args:
        expert: in evaluation mode.
        image: (H, W, 3) uint8 RGB.
        options, seed: see `masking.PatchMasking`.

    Returns:
        `image` (S, S, 3) uint8, the expert's input; `texture` (rows, columns) int64, the score of each patch;
        `mask` (rows, columns) bool, the masked patches; `masked` (S, S, 3) uint8, the masked input; `map`
        (rows, columns) float32 and `map_kind`, see `token_maps`; `logit` and `probability`.
    """
    require_trained(expert, "a map")
    masking = PatchMasking(expert, options, seed)
    pixels = prepare(image, *expert.preprocessing.key)
    batch, zero = pixels[None], torch.zeros(1, dtype=torch.int64)
    texture = texture_scores(batch, masking.patch_px, masking.score)
    hidden = masking.mask(batch, epoch=zero, index=zero)
    masked = fill_patches(batch, hidden, masking.patch_px, masking.color.cpu())
    seen = token_map(expert, pixels)
    grid = math.isqrt(texture.shape[1])
    return {
        "image": pixels.permute(1, 2, 0).numpy(),
        "texture": texture.view(grid, grid).numpy(),
        "mask": hidden.view(grid, grid).numpy(),
        "masked": masked[0].permute(1, 2, 0).numpy(),
        "map": seen.values.numpy(),
        "map_kind": seen.kind,
        "logit": seen.logit,
        "probability": 1 / (1 + math.exp(-seen.logit)),
    }


def explainer(folder: str | Path) -> Explainer:
    """Return the function that lays an expert's map over images, for the errors shown in the report.

    Raises:
        UserError: the folder is not an expert.
    """
    opened = open_expert(folder)
    expert, name = opened.expert, _name(opened, folder)

    def explained(image: np.ndarray) -> ExpertMap:
        maps = explain(expert, image)
        return ExpertMap(overlay(maps), name, _title_and_colors(maps)[0], maps["probability"])

    return explained


def explain_file(location: str, folder: str, out: str, options: Masking = TEXTURE, seed: int = 0) -> str:
    """Draw the maps of an image file for the expert in a folder; return a line about them.

    Raises:
        UserError: the image or the expert cannot be read.
    """
    opened = open_expert(folder)
    expert = opened.expert
    try:
        image = read_image(location)
    except BrokenImage as error:
        raise UserError(f"cannot read {printable(location)}: {error}") from error
    maps = explain(expert, image, options, seed)
    hidden = maps["mask"]
    mask_title = f"{options.mask} masked, {hidden.sum()} of {hidden.size} patches"
    draw(maps, f"{printable(Path(location).name)}, seen by {_name(opened, folder)}", mask_title, out)
    return f"P(AI) {maps['probability']:.4f}; {maps['map_kind']} -> {out}"


def overlay(maps: dict[str, Any]) -> np.ndarray:
    """Return the map of `explain` over the gray input as (S, S, 3) uint8, in the colors of `draw`."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    _, colors = _title_and_colors(maps)
    scaled = Normalize(colors.get("vmin"), colors.get("vmax"))(maps["map"])
    painted = colormaps[colors["cmap"]](scaled)[..., :3]
    side = maps["image"].shape[0]
    rows, columns = (np.arange(side) * tokens // side for tokens in maps["map"].shape)
    gray = maps["image"].mean(axis=2)[..., None]
    mixed = _ALPHA * 255 * painted[np.ix_(rows, columns)] + (1 - _ALPHA) * gray
    return mixed.round().astype(np.uint8)


def draw(maps: dict[str, Any], title: str, mask_title: str, out: str | Path) -> None:
    """Write a PNG of four panels; equal content gives equal bytes.

    Args:
        maps: result of `explain`.
        title: title above all panels, before P(AI).
        mask_title: title of the masked image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(_SIZE_IN, dpi=_DPI)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4)
    figure.subplots_adjust(left=0.006, right=0.994, bottom=0.08, top=0.86, wspace=0.04)
    image, side = maps["image"], maps["image"].shape[0]
    contents = (
        (image, None, f"input, {side} x {side} px", {}),
        (image, np.sqrt(maps["texture"]), "texture of each patch (square root)", {"cmap": "viridis"}),
        (maps["masked"], None, mask_title, {}),
        (image, maps["map"], *_title_and_colors(maps)),
    )
    for panel, (picture, values, name, colors) in zip(panels, contents, strict=True):
        panel.set_axis_off()
        panel.set_title(name, fontsize=10, loc="left")
        if values is None:
            panel.imshow(picture)
            continue
        panel.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=255)
        shown = panel.imshow(values, alpha=_ALPHA, extent=(-0.5, side - 0.5, side - 0.5, -0.5), **colors)
        # A little narrower than the panel, to leave room for the last number.
        scale = panel.inset_axes((0.05, -0.05, 0.9, 0.03))
        figure.colorbar(shown, cax=scale, orientation="horizontal", ticks=MaxNLocator(5))
        scale.tick_params(labelsize=7)
    # A name may hold dollar signs, which would be read as a formula.
    figure.text(0.006, 0.94, title, fontsize=12, va="center", parse_math=False)
    text = f"P(AI) = {maps['probability']:.3f}"
    figure.text(0.994, 0.94, text, fontsize=12, va="center", ha="right", weight="bold")
    with atomic.replace_file(out) as temporary:
        # Without matplotlib's version in the file, its bytes depend on the content alone.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _title_and_colors(maps: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the title of an expert's map, and its colors for matplotlib."""
    kind = maps["map_kind"]
    if kind != LOGIT:
        return kind, {"cmap": "viridis"}
    # Two colors for real and AI-generated, and none for 0.
    limit = float(np.abs(maps["map"]).max())
    return f"{kind} (red: AI)", {"cmap": "coolwarm", "vmin": -limit, "vmax": limit}


def _name(opened: Opened, folder: str | Path) -> str:
    if not is_folder(folder):
        return name_of(folder)
    return opened.card.get("recipe", {}).get("name", opened.expert.spec.name)
