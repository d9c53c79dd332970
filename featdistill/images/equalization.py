"""One shape of file for every image, so that size, quality and container no longer tell the classes apart.

In many benchmarks real images are JPEGs of all sizes and AI-generated ones PNGs of a few fixed sizes, and a
detector that has learned no more than that scores well on them. Here every image gets a size and a JPEG
quality that are drawn for its name from what is common to all classes, so that neither depends on the class.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featdistill.command_line import UserError
from featdistill.images.reading import decode, encode_jpeg
from featdistill.seeds import evaluation_generator

FITS = ("resize", "crop")
# What every operation of the distortion libraries can work on.
MIN_SIDE_PX = 16
# Side of a JPEG's blocks.
_GRID_PX = 8


@dataclass(frozen=True)
class Equalization:
    """What sizes and qualities are drawn from.

    Attributes:
        sizes: (height, width) in px, in ascending order; each is as likely as another, and one may be there
            several times. See `common_sizes`.
        quality_range_0_100: lowest and highest quality of the JPEG that is made; each whole number between
            them is as likely as another. 75 is the default of many programs, 95 what careful ones use.
        fit: `resize` cuts the largest part that has the size's aspect ratio and reduces it; `crop` cuts a
            part of just that size. Either enlarges an image that is too small.
        seed: another seed draws other sizes and qualities.
    """

    sizes: tuple[tuple[int, int], ...]
    quality_range_0_100: tuple[int, int] = (75, 95)
    fit: str = "resize"
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values; `from_json` gives them back."""
        # A thousand sizes are often a few different ones.
        counts = Counter(f"{height}x{width}" for height, width in self.sizes)
        return dataclasses.asdict(self) | {"sizes": dict(counts)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Equalization":
        """Return the settings that `as_json` made these values of."""
        sizes = []
        for size, count in values["sizes"].items():
            height, _, width = size.partition("x")
            sizes += [(int(height), int(width))] * count
        qualities = tuple(values["quality_range_0_100"])
        return cls(**{**values, "sizes": tuple(sizes), "quality_range_0_100": qualities})


def common_sizes(sizes_of_classes: Sequence[np.ndarray], spare: float = 0.05) -> tuple[tuple[int, int], ...]:
    """Return the sizes from which images of all classes can be drawn alike.

    They are the sizes of all classes, as many of each, and each is reduced, with its aspect ratio kept, until
    it can be cut without enlargement from all but a share `spare` of the images of every class, and has the
    7 px of room that put the blocks of an earlier JPEG anywhere: images that are JPEGs twice over with the
    same blocks are easy to tell from those that are for the first time.

    Args:
        sizes_of_classes: (N, 2) heights and widths in px, one array a class.
        spare: share of the images of a class that may have to be enlarged.

    Returns:
        (height, width) of each size, in ascending order; sizes may repeat.
    """
    count = max(len(sizes) for sizes in sizes_of_classes)
    alike = [sizes[np.arange(count) * len(sizes) // count] for sizes in sizes_of_classes]
    found = []
    for height, width in np.concatenate(alike).tolist():
        # How much each image of a class could be reduced before this size no longer fits into it.
        room = [((sizes - _GRID_PX + 1) / (height, width)).min(axis=1) for sizes in sizes_of_classes]
        factor = min(1.0, *(float(np.quantile(values, spare, method="lower")) for values in room))
        found.append(tuple(max(MIN_SIDE_PX, int(side * factor + 1e-9)) for side in (height, width)))
    return tuple(sorted(found))


def read_settings(path: str | Path) -> Equalization:
    """Read the settings of a copy that `python -m data_prep.equalise` made, from its `equalise.json`.

    Raises:
        UserError: the file is missing or something else.
    """
    try:
        return Equalization.from_json(json.loads(Path(path).read_text(encoding="utf-8"))["settings"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no equalise.json of python -m data_prep.equalise") from error


def equalize(image: np.ndarray, name: str, settings: Equalization) -> np.ndarray:
    """Return the image as it looks once `equalized_jpeg` has stored it: (h, w, 3) uint8 RGB."""
    return decode(equalized_jpeg(image, name, settings))


def equalized_jpeg(image: np.ndarray, name: str, settings: Equalization) -> bytes:
    """Bring an image to the size and store it in the quality that are drawn for it.

    Args:
        image: (H, W, 3) uint8 RGB.
        name: of the image; what is drawn is a function of it and of the settings alone.

    Returns:
        A JPEG with 4:2:0 chroma, the encoder's own tables and no metadata.
    """
    # The prefix: distortions of an image are drawn by its name too.
    rng = evaluation_generator(settings.seed, f"equalise:{name}")
    size = settings.sizes[rng.integers(len(settings.sizes))]
    top, left = rng.random(2)
    quality = int(rng.integers(*settings.quality_range_0_100, endpoint=True))
    return encode_jpeg(cut(image, size, settings.fit, top, left), quality)


def cut(image: np.ndarray, size: tuple[int, int], fit: str, top: float, left: float) -> np.ndarray:
    """Cut a part from an image and bring it to a size.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: (h, w) of the result in px.
        fit: see `Equalization`.
        top, left: where the part is taken, as fractions in [0, 1) of the room that there is.

    Returns:
        (h, w, 3) uint8.
    """
    sides = image.shape[:2]
    # How many pixels of the image make one of the result; below 1 the image is enlarged.
    step = min(sides[0] / size[0], sides[1] / size[1])
    step = min(step, 1.0) if fit == "crop" else step
    part = [min(side, max(1, round(wanted * step))) for side, wanted in zip(sides, size, strict=True)]
    # One place more than there is room for: a fraction below 1 never reaches the last one.
    first = [int(place * (side - own + 1)) for place, side, own in zip((top, left), sides, part, strict=True)]
    image = image[first[0] : first[0] + part[0], first[1] : first[1] + part[1]]
    if image.shape[:2] == tuple(size):
        return np.ascontiguousarray(image)
    # With a filter as wide as the reduction asks for. OpenCV's area averaging blurs by 1.1 more than by 2, so
    # that it would tell what was reduced by how much.
    whole = Image.fromarray(np.ascontiguousarray(image))
    return np.array(whole.resize(size[::-1], Image.Resampling.BICUBIC))
