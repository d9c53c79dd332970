"""Test-time augmentation: several views of an image, whose logits are averaged for each expert.

| name | views of an image |
|---|---|
| `none` | that of the expert's preprocessing |
| `hflip` | all other views, and their mirror images |
| `five_crop` | the four corners and the center of the image, resized to 8 / 7 of the input's size |
| `scales` | the image at 0.85, 1 and 1.15 times the input's size |
| `blur` | the image and, once it has the input's size, a blurred copy (Gaussian, 1 px) |
| `jpeg` | the same with a copy in JPEG of quality 75 |
| `rapid` | eight views: the image, mirrored, at 0.85 and 1.15, two corners, blurred, in JPEG |
| `redelivery` | the image as it would arrive in six ways: as thumbnails, in JPEG and WebP, from messengers |

Names can be combined with `+`: `hflip+five_crop` are ten views, `blur+jpeg` are three. The loader's workers
cut all views from one decoded image; mirroring is done on the device. Nothing is drawn at random. The paper
uses none of them (section 4.4). `rapid` has the eight views of the team Reagvis Labs (NTIRE 2026, arXiv
2604.11487) as far as they are published: flip, scales, corners, blur and JPEG are theirs, how many of each
and how strong is ours.
"""

from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

from featdistill.command_line import one_of
from featdistill.data.preprocessing import InputKey, Side, fit, shorter_side, side_of, to_planes
from featdistill.distortions.kernels.codecs import jpeg
from featdistill.distortions.kernels.filters import gaussian_blur
from featdistill.distortions.operation import MIN_SIDE_PX
from featdistill.distortions.plan import Plan, Step, apply_plan
from featdistill.images.reading import limit_side

# Krizhevsky et al. 2012, section 4.1: corners and center of 224 px of an image of 256 px.
_FIVE_CROP_SCALE = 256 / 224
# Ours: far enough apart to move every patch, close enough to preserve the traces of a generator.
_SCALES = (0.85, 1.15)
_CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))
# Ours: a level-3 blur of the official library, and a quality that is common on the web.
_DEGRADATIONS = {"blur": lambda square: gaussian_blur(square, 1.0), "jpeg": lambda square: jpeg(square, 75)}


# Ours: each way of the preset `redelivery` at middle levels, without AVIF, which not every Pillow has.
_DELIVERIES: dict[str, Plan] = {
    "_".join(f"{name}{level}" for name, level in way): tuple(
        Step("redelivery", name, level, seed=0) for name, level in way
    )
    for way in (
        [("thumbnail", 2)],
        [("thumbnail", 4), ("resaved_jpeg", 2)],
        [("resaved_jpeg", 4)],
        [("resaved_webp", 3)],
        [("messenger", 3)],
        [("screenshot", 3), ("messenger", 5)],
    )
}


class View(NamedTuple):
    """One view of an image.

    Attributes:
        scale: size of the resized image relative to the input's.
        top, left: position of the crop, as fractions of the space that it leaves.
        mirrored: whether it is flipped from left to right.
        degraded: what is done to it when it has the input's size: `blur`, `jpeg`, or nothing.
        delivery: what is done to the whole image before all else, a key of `_DELIVERIES`, or nothing.
    """

    scale: float = 1.0
    top: float = 0.5
    left: float = 0.5
    mirrored: bool = False
    degraded: str = ""
    delivery: str = ""

    def key(self, key: InputKey) -> tuple:
        """Return the key under which a batch holds this view for experts with the input `key`."""
        return key if self.is_plain else (*key, *self._replace(mirrored=False))

    @property
    def is_plain(self) -> bool:
        """Whether its pixels, before mirroring, are those without test-time augmentation."""
        return self._replace(mirrored=False) == View()


PLAIN = (View(),)
_FIVE_CROP = tuple(View(_FIVE_CROP_SCALE, top, left) for top, left in _CORNERS)
_OTHER_SCALES = tuple(map(View, _SCALES))
_DEGRADED = tuple(View(degraded=name) for name in _DEGRADATIONS)
# By name: in this order, each view once.
_VIEWS = {
    "scales": (*PLAIN, *_OTHER_SCALES),
    "five_crop": _FIVE_CROP,
    "blur": (*PLAIN, _DEGRADED[0]),
    "jpeg": (*PLAIN, _DEGRADED[1]),
    "redelivery": tuple(View(delivery=name) for name in _DELIVERIES),
    "rapid": (*PLAIN, View(mirrored=True), *_OTHER_SCALES, _FIVE_CROP[0], _FIVE_CROP[3], *_DEGRADED),
}
TTA = ("none", "hflip", "five_crop", "scales", "blur", "jpeg", "rapid", "redelivery")


def parse_tta(text: str) -> tuple[str, tuple[View, ...]]:
    """Return the canonical spelling of a combination of names, and its views.

    Raises:
        UserError: a name is unknown.
    """
    names = {one_of("test-time augmentation", name, TTA) for name in text.split("+")} - {"none"}
    views = [view for name, own in _VIEWS.items() if name in names for view in own] or list(PLAIN)
    if "hflip" in names:
        views = [view._replace(mirrored=mirrored) for view in views for mirrored in (False, True)]
    return "+".join(name for name in TTA if name in names) or "none", tuple(dict.fromkeys(views))


def cut_views(
    image: np.ndarray, keys: Iterable[InputKey], views: Iterable[View] = PLAIN
) -> dict[tuple, Tensor]:
    """Return all views of an image (H, W, 3) for experts with the inputs `keys`, by `View.key`."""
    cuts = {view.key(key): (key, view) for key in keys for view in views}
    return {name: cut_view(image, *key, view=view) for name, (key, view) in cuts.items()}


def cut_view(
    image: np.ndarray, size: Side, resize: str, max_side_px: int | None = None, *, view: View
) -> Tensor:
    """Cut a view from an image and fit it to a backbone's input, without mirroring.

    A window of the image, smaller by the view's scale than the part that is seen without test-time
    augmentation, is resized to the input; pixels beyond the image are filled by reflection. With `crop`
    and `pad`, which do not resize, `five_crop` cuts windows of the input's size.

    Args:
        image: (H, W, 3) uint8 RGB.
        size, resize, max_side_px: see `prepare`.

    Returns:
        (3, S, S) uint8.
    """
    image = _delivered(image, view.delivery)
    square = _cut_square(image, size, resize, max_side_px, view)
    return to_planes(_DEGRADATIONS[view.degraded](square) if view.degraded else square)


def _cut_square(
    image: np.ndarray, size: Side, resize: str, max_side_px: int | None, view: View
) -> np.ndarray:
    if view._replace(degraded="", delivery="").is_plain:
        return fit(image, size, resize, max_side_px)
    image = limit_side(image, max_side_px)
    size = side_of(image, size)
    height, width = image.shape[:2]
    is_cut = resize in ("crop", "pad")
    scale = 1.0 if is_cut and view.scale == _FIVE_CROP_SCALE else view.scale
    side = size if is_cut else min(height, width) * size / shorter_side(size, resize)
    seen = (height, width) if resize == "squash" else (side, side)
    rows, columns = (max(1, round(side / scale)) for side in seen)
    window = _window(image, rows, columns, view)
    return fit(window, size, "squash")


def _window(image: np.ndarray, rows: int, columns: int, view: View) -> np.ndarray:
    height, width = image.shape[:2]
    top, left = int(view.top * max(0, height - rows)), int(view.left * max(0, width - columns))
    part = np.ascontiguousarray(image[top : top + rows, left : left + columns])
    above, before = (rows - part.shape[0]) // 2, (columns - part.shape[1]) // 2
    below, behind = rows - part.shape[0] - above, columns - part.shape[1] - before
    if not (above or below or before or behind):
        return part
    return cv2.copyMakeBorder(part, above, below, before, behind, cv2.BORDER_REFLECT_101)


def _delivered(image: np.ndarray, delivery: str) -> np.ndarray:
    # An image of fewer pixels than an operation needs is seen as it is.
    if not delivery or min(image.shape[:2]) < MIN_SIDE_PX:
        return image
    return apply_plan(image, _DELIVERIES[delivery])
