"""From an image to the square input of a backbone: resized, cropped and mirrored, in uint8 throughout."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from featdistill.command_line import UserError
from featdistill.images.reading import limit_side

# Side of an input: fixed, or one of several, by the image (see `side_of`).
Side = int | tuple[int, ...]
# `sides`, `resize`, and `max_side_px` if there is one: the arguments of `fit`.
InputKey = tuple[Side, str] | tuple[Side, str, int]


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects as its input.

    Attributes:
        size: side S of the input in px; with `sizes`, the smallest.
        resize: `shorter` (antialiased bicubic of the shorter side to S, then crop), `squash` (both sides to
            S), or `crop` (no resizing; an image smaller than S is tiled). Published detectors also have
            torchvision's: `bilinear:N` and `bicubic:N` (Pillow's filter, of the shorter side to N px, then
            crop) and `pad` (no resizing; an image smaller than S gets a black border). `rounded:N` is
            `bilinear:N` with the longer side rounded, not cut off, and the crop's position rounded down.
        mean, std: normalization of pixels in [0, 1], done on the device.
        max_side_px: the longer side to which larger images are reduced before all else, see `limit_side`;
            that of the distortion policy in training.
        sizes: sides of inputs, ascending, out of which each image gets its own, see `side_of`; empty if all
            inputs have the same size.
    """

    size: int
    resize: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    max_side_px: int | None = None
    sizes: tuple[int, ...] = ()

    @property
    def sides(self) -> Side:
        """The side of every input, or the sides that images choose from."""
        return self.sizes or self.size

    @property
    def span(self) -> str:
        """The side of the inputs, for people to read."""
        return f"{self.sizes[0]} to {self.sizes[-1]} px" if self.sizes else f"{self.size} px"

    def require_one_size(self, what: str) -> None:
        """Raise a `UserError` if the size of an input depends on the image."""
        if self.sizes:
            raise UserError(
                f"{what} needs inputs of one size; those of this expert have {self.span}, by the image "
                "(input_sizes)"
            )

    @property
    def key(self) -> InputKey:
        """Experts with the same key share one prepared image."""
        return (self.sides, self.resize, *([self.max_side_px] if self.max_side_px else []))

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values; what does not exist is left out, as in older cards."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value not in (None, ())}


class Place(NamedTuple):
    """A crop of an image.

    Attributes:
        top, left: its position, as fractions of the space that the crop leaves.
        flip: whether it is mirrored.
        area: share of the image's area that is cropped before resizing; None: `resize` decides.
        aspect: width by height of that crop.
    """

    top: float = 0.5
    left: float = 0.5
    flip: bool = False
    area: float | None = None
    aspect: float = 1.0


CENTER = Place()
_MAX_ASPECT = 16
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ROUNDED = "rounded:"


def parse_sizes(text: str | None) -> tuple[int, ...]:
    """Return the sides in a text such as `384,768,1152`, ascending; nothing for None.

    Raises:
        UserError: they are not numbers above 0.
    """
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"input_sizes must be sides in px, such as 384,768,1152, not '{text}'")
    return tuple(sorted({int(part) for part in parts}))


def side_of(image: np.ndarray, sides: Side) -> int:
    """Return the side of an image's input: of several, the largest that is at most its own shorter side.

    It is the smallest if none is, so that only small images are enlarged.
    """
    if isinstance(sides, int):
        return sides
    return max((side for side in sides if side <= min(image.shape[:2])), default=min(sides))


def prepare(
    image: np.ndarray, size: Side, resize: str, max_side_px: int | None = None, *, place: Place = CENTER
) -> Tensor:
    """Fit an image to a backbone's input.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: side S of the result in px, or several to choose from, see `side_of`.
        resize, max_side_px: see `Preprocessing`.

    Returns:
        (3, S, S) uint8.
    """
    return to_planes(fit(image, size, resize, max_side_px, place=place))


def fit(
    image: np.ndarray, size: Side, resize: str, max_side_px: int | None = None, *, place: Place = CENTER
) -> np.ndarray:
    """Return the result of `prepare` as (S, S, 3) uint8, always a new array."""
    image = limit_side(image, max_side_px)
    size = side_of(image, size)
    if place.area is not None:
        image, resize = _part(image, *_box(image, place.area, place.aspect), place).copy(), "squash"
    elif _is_strip(image.shape, resize):
        # Only a part of a strip is ever seen, and an enlarged strip could fill the memory.
        longest = _MAX_ASPECT * min(image.shape[:2])
        image = _part(image, longest, longest, place).copy()
    image = _resized(image, size, resize)
    if resize == "pad":
        image = _padded(image, size)
    elif min(image.shape[:2]) < size:
        image = np.tile(image, (*(-(-size // side) for side in image.shape[:2]), 1))
    square = _part(image, size, size, place)
    return cv2.flip(square, 1) if place.flip else square.copy()


def before_crop(image: np.ndarray, size: int, resize: str) -> np.ndarray:
    """Return the image that `fit` crops; `fit` of it equals `fit` of the image, but is faster.

    Args:
        image: (H, W, 3) uint8 RGB.
        size, resize: as for `fit`, where `place.area` must be None; the image is within its limit.

    Returns:
        (h, w, 3) uint8; `image` itself where nothing is resized before the crop.
    """
    return image if _is_strip(image.shape, resize) else _resized(image, size, resize)


def to_planes(image: np.ndarray) -> Tensor:
    """Turn (H, W, 3) uint8 into (3, H, W)."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))
    return torch.from_numpy(planes)


def fit_stack(images: Tensor, size: int, resize: str) -> Tensor:
    """Fit images of one size to a backbone's input, on the device that holds them.

    As in `fit`, the width is resized and rounded before the height, but by weights in float32 where `fit` has
    integers: a few values differ, by up to 2 levels. What is not resized is equal.

    Args:
        images: (N, 3, H, W) uint8.
        size: side S of the result in px.
        resize: `shorter`, `squash` or `crop`.

    Returns:
        (N, 3, S, S) uint8.
    """
    if _is_strip(images.shape[2:], resize):
        longest = _MAX_ASPECT * min(images.shape[2:])
        images = images[..., *_window(images.shape[2:], longest, longest, CENTER)]
    target = images.shape[2:] if resize == "crop" else _target(*images.shape[2:], size, resize)
    for shape in ((images.shape[2], target[1]), target):
        if shape != images.shape[2:]:
            resized = interpolate(images.float(), shape, mode="bicubic", antialias=True)
            images = resized.round_().clamp_(0, 255).byte()
    if min(target) < size:
        images = images.repeat(1, 1, *(-(-size // side) for side in target))
    return images[..., *_window(images.shape[2:], size, size, CENTER)]


def _is_strip(shape: Sequence[int], resize: str) -> bool:
    shorter, longer = sorted(shape[:2])
    return (resize == "shorter" or ":" in resize) and longer > _MAX_ASPECT * shorter


def _resized(image: np.ndarray, size: int, resize: str) -> np.ndarray:
    height, width = image.shape[:2]
    if resize in ("crop", "pad"):
        return image
    if resize.startswith(_ROUNDED):
        scale = shorter_side(size, resize) / min(height, width)
        image = _resampled(image, round(height * scale), round(width * scale), "bilinear")
        # The middle of what is left is at the position that is rounded down.
        height, width = image.shape[:2]
        return image[: height - (height - size) % 2, : width - (width - size) % 2]
    target = _target(height, width, size, resize)
    if target == (height, width):
        return image
    if ":" in resize:
        return _resampled(image, *target, resize.partition(":")[0])
    # Permuted like this, PyTorch recognizes the channels-last format and resizes the channels together.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    pixels = interpolate(pixels, target, mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def _target(height: int, width: int, size: int, resize: str) -> tuple[int, int]:
    """Return height and width of a resized image, before the crop."""
    shorter, side = min(height, width), shorter_side(size, resize)
    return (size, size) if resize == "squash" else (side * height // shorter, side * width // shorter)


def _resampled(image: np.ndarray, height: int, width: int, how: str) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), _FILTERS[how]))


def shorter_side(size: int, resize: str) -> int:
    """Return the length in px to which `shorter`, `bilinear:N` and their like bring the shorter side."""
    return int(resize.partition(":")[2] or size)


def _padded(image: np.ndarray, size: int) -> np.ndarray:
    """Center an image on black where it is smaller than S, like torchvision's `CenterCrop`."""
    rows, columns = (max(0, size - side) for side in image.shape[:2])
    borders = (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)
    return cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT)


def _box(image: np.ndarray, area: float, aspect: float) -> tuple[int, int]:
    """Return height and width of a part with a share of the area, reduced if that does not fit."""
    height, width = image.shape[:2]
    box_height = math.sqrt(area * height * width / aspect)
    factor = min(1.0, height / box_height, width / (box_height * aspect))
    return max(1, round(box_height * factor)), max(1, round(box_height * aspect * factor))


def _part(image: np.ndarray, height: int, width: int, place: Place) -> np.ndarray:
    return image[_window(image.shape, height, width, place)]


def _window(shape: Sequence[int], height: int, width: int, place: Place) -> tuple[slice, slice]:
    top, left = offset(place.top, shape[0] - height), offset(place.left, shape[1] - width)
    return slice(top, top + height), slice(left, left + width)


def offset(share: float, space: int) -> int:
    """Return the position of a crop in px, from 0 to the space that it leaves.

    With a uniform share in [0, 1), all positions are equally likely. In the center it is rounded, like in the
    authors' release (torchvision).
    """
    space = max(0, space)
    return round(share * space) if share == 0.5 else min(space, int(share * (space + 1)))
