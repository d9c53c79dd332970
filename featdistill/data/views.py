"""Test-time augmentation: several views of an image, whose logits are averaged for each expert.

| name | views of an image |
|---|---|
| `none` | that of the expert's preprocessing |
| `hflip` | all other views, and their mirror images |
| `five_crop` | the four corners and the center of the image, resized to 8 / 7 of the input's size |
| `scales` | the image at 0.85, 1 and 1.15 times the input's size |

Names can be combined with `+`: `hflip+five_crop` are ten views. The loader's workers cut all views from one
decoded image; mirroring is done on the device. The paper uses none of them (section 4.4).
"""

from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

from featdistill.command_line import one_of
from featdistill.data.preprocessing import InputKey, fit, to_planes
from featdistill.images.reading import limit_side

TTA = ("none", "hflip", "five_crop", "scales")
# Krizhevsky et al. 2012, section 4.1: corners and center of 224 px of an image of 256 px.
_FIVE_CROP_SCALE = 256 / 224
# Ours: far enough apart to move every patch, close enough to preserve the traces of a generator.
_SCALES = (0.85, 1.15)
_CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))


class View(NamedTuple):
    """One view of an image.

    Attributes:
        scale: size of the resized image relative to the input's.
        top, left: position of the crop, as fractions of the space that it leaves.
        mirrored: whether it is flipped from left to right.
    """

    scale: float = 1.0
    top: float = 0.5
    left: float = 0.5
    mirrored: bool = False

    def key(self, key: InputKey) -> tuple:
        """Return the key under which a batch holds this view for experts with the input `key`."""
        return key if self.is_plain else (*key, self.scale, self.top, self.left)

    @property
    def is_plain(self) -> bool:
        """Whether its pixels, before mirroring, are those without test-time augmentation."""
        return (self.scale, self.top, self.left) == (1.0, 0.5, 0.5)


PLAIN = (View(),)


def parse_tta(text: str) -> tuple[str, tuple[View, ...]]:
    """Return the canonical spelling of a combination of names, and its views.

    Raises:
        UserError: a name is unknown.
    """
    names = {one_of("test-time augmentation", name, TTA) for name in text.split("+")} - {"none"}
    views: list[View] = []
    if "scales" in names or "five_crop" not in names:
        views.append(View())
    if "scales" in names:
        views += [View(scale) for scale in _SCALES]
    if "five_crop" in names:
        views += [View(_FIVE_CROP_SCALE, top, left) for top, left in _CORNERS]
    if "hflip" in names:
        views = [view._replace(mirrored=mirrored) for view in views for mirrored in (False, True)]
    return "+".join(name for name in TTA if name in names) or "none", tuple(views)


def cut_view(
    image: np.ndarray, size: int, resize: str, max_side_px: int | None = None, *, view: View
) -> Tensor:
    """Cut a view from an image and fit it to a backbone's input, without mirroring.

    A window of the image, smaller by the view's scale than the part that is seen without test-time
    augmentation, is resized to the input; pixels beyond the image are filled by reflection. With `crop`,
    which does not resize, `five_crop` cuts windows of the input's size.

    Args:
        image: (H, W, 3) uint8 RGB.
        size, resize, max_side_px: see `Preprocessing`.

    Returns:
        (3, size, size) uint8.
    """
    if view.is_plain:
        return to_planes(fit(image, size, resize, max_side_px))
    image = limit_side(image, max_side_px)
    height, width = image.shape[:2]
    scale = 1.0 if resize == "crop" and view.scale == _FIVE_CROP_SCALE else view.scale
    shorter = min(height, width)
    seen = {"squash": (height, width), "shorter": (shorter, shorter), "crop": (size, size)}[resize]
    rows, columns = (max(1, round(side / scale)) for side in seen)
    window = _window(image, rows, columns, view)
    return to_planes(fit(window, size, "squash"))


def _window(image: np.ndarray, rows: int, columns: int, view: View) -> np.ndarray:
    height, width = image.shape[:2]
    top, left = int(view.top * max(0, height - rows)), int(view.left * max(0, width - columns))
    part = np.ascontiguousarray(image[top : top + rows, left : left + columns])
    above, before = (rows - part.shape[0]) // 2, (columns - part.shape[1]) // 2
    below, behind = rows - part.shape[0] - above, columns - part.shape[1] - before
    if not (above or below or before or behind):
        return part
    return cv2.copyMakeBorder(part, above, below, before, behind, cv2.BORDER_REFLECT_101)
